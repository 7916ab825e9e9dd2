"""YAML files and flags become a `Config`; user errors become one sentence and an exit code.

The only module that knows the parser. It imports nothing heavy, so `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gc
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import jsonargparse
import yaml

from tortoise_hf.config import Config
from tortoise_hf.errors import Interrupted, UserError

AnyConfig = TypeVar("AnyConfig")


def sections_of(config_class: type) -> dict[str, type]:
    """Sections of a config by name, in order."""
    types = typing.get_type_hints(config_class)
    return {field.name: types[field.name] for field in dataclasses.fields(config_class)}


SECTIONS = sections_of(Config)
"""Of a fine-tuning run's settings."""


class _Parser(jsonargparse.ArgumentParser):
    """Says what is wrong in a sentence, without the page of usage."""

    sections: Mapping[str, type] = {}
    """Names and classes of the settings it offers."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and leave with exit code 2."""
        print(f"error: {_tidy(message, self.sections)}\nSee --help for all settings.", file=sys.stderr)
        raise SystemExit(2)


def _tidy(message: str, sections: Mapping[str, type]) -> str:
    """The parser's message in one line, in words a user knows, with a suggestion for a mistyped key."""
    text = " ".join(line.strip() for line in str(message).splitlines() if line.strip())
    text = text.removeprefix("Parser key ").removeprefix("Problem in default config file ")
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = text.replace("Expected a one of", "expected one of").replace("Expected a ", "expected a value of type ")
    text = text.replace(". Got value:", ", got")
    optional = re.fullmatch(
        r"(.*): Does not validate .* Errors: - (.*) - .*NoneType(?:, got .*?)? Given value type: .* value: (.*)",
        text,
    )
    if optional:
        key, expected, value = optional.groups()
        expected = re.sub(r", got .*", "", expected.replace(" - expected a value of type", " or"))
        text = f"{key}: {expected}, got {value}"
        if re.fullmatch(r"\d[\d.]*e\d", value) and float(value).is_integer():
            text += f"; write {float(value):.0f}"
    unknown = re.search(r"Group '(\w+)' does not accept option '([\w.]+)'", text)
    if unknown:
        return f"{unknown[1]}.{unknown[2]} is not a setting{_suggest(f'{unknown[1]}.{unknown[2]}', sections)}"
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", text) or re.search(r"[Oo]ption '([\w.]+)'", text)
    if unknown:
        return f"{unknown[1]} is not a setting{_suggest(unknown[1], sections)}"
    required = re.search(r"the following arguments are required: (.*)", text)
    if required:
        return f"{required[1]}: not set; give a value in a --config file or as a flag."
    return text


def _wrong_with_file(path: Path) -> str | None:
    """What keeps a settings file from being read, in a sentence; the parser doesn't say which file, or where in it."""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except OSError as error:
        return f"--config: {path} can't be read ({error.strerror})."
    except UnicodeDecodeError:
        return f"--config: {path} is not UTF-8; save it as that."
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if mark is None:
            return f"--config: {path} is not YAML ({' '.join(str(error).split())})."
        if "\t" in "".join(text.splitlines()[mark.line : mark.line + 1])[: mark.column + 1]:
            return f"--config: {path} line {mark.line + 1} is indented with a tab; use spaces, two for each level."
        return (
            f"--config: {path} line {mark.line + 1} is not YAML ({error.problem}); expected a section such as data: "
            "and below it, indented with spaces, lines such as root: my_recordings."
        )
    if isinstance(values, dict) and any(section is not None for section in values.values()):
        return None
    return (
        f"--config: {path} holds no settings; expected a section such as data: and below it, indented with spaces, "
        "lines such as root: my_recordings."
    )


def _suggest(key: str, sections: Mapping[str, type]) -> str:
    """The nearest setting's name, as the end of a sentence."""
    known = [f"{name}.{field.name}" for name, section in sections.items() for field in dataclasses.fields(section)]
    nearest = difflib.get_close_matches(key, [*known, *sections], n=1)
    return f"; did you mean {nearest[0]}?" if nearest else "."


def build_parser(description: str, config_class: type = Config) -> jsonargparse.ArgumentParser:
    """Parser with a `--config` and a `--section.key` flag for every setting.

    Args:
        description: what `--help` begins with.
        config_class: dataclass whose fields are sections, dataclasses as well. A field's metadata may name settings of
            its section, as `hidden`, that aren't offered.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        description=description,
        usage="%(prog)s --config FILE.yaml [--section.key value ...]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,  # otherwise a shortened, perhaps mistyped key counts as the setting it begins
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with settings; may be given several times, later files and flags win.",
    )
    parser.sections = sections_of(config_class)
    hidden = {field.name: set(field.metadata.get("hidden", ())) for field in dataclasses.fields(config_class)}
    for name, section in parser.sections.items():
        parser.add_class_arguments(section, name, skip=hidden[name])
    return parser


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Help text at a readable width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=110, max_help_position=32)


def load_config(argv: Sequence[str] | None, description: str, config_class: type[AnyConfig] = Config) -> AnyConfig:
    """Settings out of command-line arguments (`None`: the process's own), as a `config_class` (see `build_parser`).

    Raises:
        SystemExit: with code 2 after one sentence on stderr, if a key, type or value is wrong; 0 after `--help`.
    """
    parser = build_parser(description, config_class)
    arguments = list(sys.argv[1:] if argv is None else argv)
    for flag, value in zip(arguments, [*arguments[1:], None], strict=True):
        path = value if flag == "--config" else flag.partition("--config=")[2]
        problem = _wrong_with_file(Path(path)) if path else None
        if problem:
            parser.error(problem)
    values = parser.parse_args(arguments)
    try:
        sections = parser.instantiate(values)
        return config_class(**{name: getattr(sections, name) for name in parser.sections})
    except ValueError as error:  # a range check of config.py
        parser.error(str(error))


@contextlib.contextmanager
def loading_packages() -> Iterator[None]:
    """Around imports: without looking for garbage, of which there is little, in half a million new objects.

    Nor is it looked for among them later, in training or at the end; that took longer than a second of every start.
    """
    if "torch" in sys.modules or not gc.isenabled():  # a program that lives already: its garbage must not be kept
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def run(main: Callable[[], None]) -> None:
    """Call a script's main; end in words and an exit code instead of a traceback.

    A `UserError` becomes its message on stderr and exit code 1; Ctrl-C and SIGTERM become 130 and 143. Progress bars
    move twice a minute where nobody watches: in a file every move stays.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # read by tqdm when it is imported
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except Interrupted as stop:
        print(f"Stopped by {stop}; the step is saved. The same command goes on from there.", flush=True)
        raise SystemExit(stop.exit_code) from None
    except (OSError, RuntimeError) as error:
        from tortoise_hf.faults import explain  # imports torch, as whatever failed has done before

        sentence = explain(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # before the first step or after the last one
        print("Stopped by SIGINT; nothing is lost. The same command goes on from here.", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
