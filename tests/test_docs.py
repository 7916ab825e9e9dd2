"""The documentation is true: its commands parse, its settings and files exist, its quotes are the program's words."""

from __future__ import annotations

import ast
import dataclasses
import html
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from tortoise_hf import plan
from tortoise_hf.cli import SECTIONS

DOCS = REPOSITORY / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
GUIDE = PAGES["from-the-colab-guide.md"]
TROUBLE = PAGES["troubleshooting.md"]
SETTINGS = {f"{name}.{field.name}" for name, section in SECTIONS.items() for field in dataclasses.fields(section)}
SETTING = re.compile(rf"\b((?:{'|'.join(SECTIONS)})\.[a-z]\w*)")
NOT_SETTINGS = (".py", ".md", ".yaml", ".json", ".safetensors", ".txt", ".csv", ".html", ".sbatch")

BY_HAND = {".", "cd", "cp", "git", "hf", "make", "export", "sox", "mkdir"}
"""Programs the documentation calls besides this project's own."""


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """Shell commands of a page, one a line; what `srun bash -c` starts counts as a command."""
    found = []
    for block in blocks(page, "bash"):
        lines = block.replace("\\\n", " ").splitlines()
        found += [line.split("   #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    for block in blocks(page, ""):
        found += [line for line in block.splitlines() if line.startswith(("python ", "accelerate "))]
    found = [re.sub(r"^srun bash -c '(.*)'$", r"\1", line) for line in found]
    # Whatever a shell would put there is a number or a name.
    return [re.sub(r"\$\(\(.*?\)\)|\$SLURM_\w+", "2", line).replace("$FIRST", "10.0.0.1") for line in found]


# --- commands --------------------------------------------------------------------------------------------------------


@cache
def script(name: str):
    """A script as a module that parses its arguments and then does nothing."""
    spec = importlib.util.spec_from_file_location(f"documented_{name}", REPOSITORY / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.run = lambda main: None
    return module


def check_command(line: str) -> str:
    """Parse a command with the parser of the program it calls; what kind it was."""
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] in ("python", sys.executable):
        script(Path(words[1]).stem).main(words[2:])
        return words[1]
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        parsed = launch_command_parser().parse_args(words[2:])
        assert parsed.config_file is None or Path(parsed.config_file).is_file()
        script(Path(parsed.training_script).stem).main(parsed.training_script_args)
        return "accelerate launch"
    assert words[0] in BY_HAND, f"who knows {line!r}?"
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    if words[0] == "cp":
        subprocess.run(words, check=True)
    return words[0]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page, tmp_path, monkeypatch):
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    shutil.copy(REPOSITORY / "accelerate_config.yaml", tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copy(REPOSITORY / "configs" / "my_voice.yaml", tmp_path / "runs")  # as the notebook would leave one
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        try:
            check_command(line)
        except SystemExit as error:
            pytest.fail(f"{page}: {line!r} is refused ({error.code})")


def test_the_pages_have_commands():
    kinds = [line.split()[0] for page in PAGES for line in commands(page)]
    assert kinds.count("python") >= 12
    assert sum("accelerate launch" in line for page in PAGES for line in commands(page)) >= 6


@pytest.mark.parametrize("line", ["python scripts/train.py --config configs/demo.yaml --optim.learning_rat 1e-5",
                                  "accelerate launch --multi_gpus scripts/train.py --config configs/demo.yaml",
                                  "python scripts/speak.py Hello --voices x"])  # fmt: skip
def test_a_command_that_is_wrong_is_noticed(line, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit):
        check_command(line)


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences_parse(page, tmp_path, monkeypatch):
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"`(python scripts/[^`]*)`", PAGES[page]):
        if len(line.split()) > 2:
            try:
                check_command(line)
            except SystemExit as error:
                if error.code != 0:  # --help
                    pytest.fail(f"{page}: {line!r} is refused")


# --- settings, files, quotes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_it_names_exists(page):
    text = re.sub(r"tortoise_hf(\.\w+)+|huggingface\.co\S*|\w+\.sbatch", "", PAGES[page])
    named = {name for name in SETTING.findall(text) if not name.endswith(NOT_SETTINGS)}
    notebooks_own = {"optim.", "train.", "eval.", "logger.", "path.", "upgrades."}
    assert {name for name in named if name.split(".")[0] + "." not in notebooks_own or name in SETTINGS} <= SETTINGS
    assert page not in ("from-the-colab-guide.md", "hub.md", "troubleshooting.md") or len(named) > 3


@pytest.mark.parametrize("page", PAGES)
def test_every_yaml_parses(page):
    from tortoise_hf.cli import build_parser

    for block in blocks(page, "yaml"):
        settings = yaml.safe_load(block)
        keys = {f"{section}.{name}" for section, values in settings.items() for name in values}
        assert keys <= SETTINGS, f"{page}: {keys - SETTINGS}"
        settings.setdefault("data", {}).setdefault("root", "x")
        settings.setdefault("training", {}).setdefault("output_dir", "y")
        build_parser("").parse_object(settings)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_it_names_exists(page):
    for name in re.findall(r"`((?:configs|scripts|docs|examples|tests|tortoise_hf|benchmarks)/[\w./]+)`", PAGES[page]):
        assert (REPOSITORY / name).exists() or name == "configs/anna.yaml", f"{page}: {name}"
    for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGES[page]):
        assert (DOCS / name).is_file(), f"{page}: {name}"


@cache
def sentences() -> list[str]:
    """Every string the program holds, with … where it puts something in."""

    def text(node: ast.AST) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return re.sub(r"%[ds r]", "…", node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(text(value) or "…" for value in node.values)
        return None

    found = []
    for path in [*REPOSITORY.glob("tortoise_hf/**/*.py"), *REPOSITORY.glob("scripts/*.py")]:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found += [text(node) for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr))]
    return [one for one in found if one]


def is_said(quote: str) -> bool:
    """Whether the program says this; … in the quote stands for anything."""
    parts = [re.escape(part) for part in html.unescape(quote).split("…")]
    pattern = re.compile(".*?".join(parts), flags=re.DOTALL)
    return any(pattern.search(sentence) for sentence in sentences())


def quotes() -> list[str]:
    """What the first column of the failure table quotes: words in code's type, three or more of them."""
    rows = [line.split(" | ")[0] for line in TROUBLE.splitlines() if line.startswith("| ") and " | " in line]
    found = [one or other for row in rows for one, other in re.findall(r"`([^`]+)`|<code>(.+?)</code>", row)]
    return [quote for quote in found if len(quote.split()) > 2]


def test_every_message_is_quoted_as_the_program_says_it():
    assert len(quotes()) >= 30
    assert [quote for quote in quotes() if not is_said(quote)] == []
    assert not is_said("Step …: out of memory with a single cat")


def test_the_failure_table_has_what_people_ask():
    rows = [line for line in TROUBLE.splitlines() if line.startswith("| ") and not line.startswith("| You see")]
    assert len(rows) >= 40
    assert all(line.count("|") == 4 for line in rows)


# --- the site --------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation():
    nav = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    assert sorted(re.findall(r"([\w-]+\.md)", nav)) == sorted(PAGES)


def test_the_site_builds_and_every_link_leads_somewhere(tmp_path):
    """With the generator's own check of pages and anchors; in a copy, so that nothing is left behind."""
    zensical = pytest.importorskip("zensical", reason="needs zensical (Python 3.11 or newer): pip install '.[docs]'")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(REPOSITORY / "mkdocs.yml", tmp_path)
    command = [sys.executable, "-c", "from zensical.main import cli; cli()", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert zensical is not None
    for name in PAGES:
        assert (tmp_path / "site" / name.replace(".md", ".html")).is_file()


# --- the guide for those who come from the notebook -------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    ["`Experiment_Name", "`Dataset_Training_Path", "ValidationDataset_Training_Path", "dataset names", "Fp16",
     "TrainingRate", "TrainBS", "ValBS", "ValFreq", "LRDecaySteps", "PrintFreq", "SaveCheckpointFreq"],
)  # fmt: skip
def test_every_field_of_the_notebook_has_a_home(field):
    fields = GUIDE.split("\n## ")[1]
    (row,) = [line for line in fields.splitlines() if line.startswith("|") and field in line.split("|")[1]]
    assert row.count("|") == 5


def test_its_numbers_are_the_plans():
    low, high = plan.EPOCHS
    assert f"{plan.HOURS_HEARD} hours of listening, {low} to {high} epochs" in GUIDE
    assert f"{plan.MOST_CLIPS_AT_ONCE['cuda']} on a GPU, {plan.MOST_CLIPS_AT_ONCE['cpu']} on a CPU" in GUIDE
    assert f"after {plan.PATIENCE} evaluations without improvement" in GUIDE
    assert f"fewer than {plan.ENOUGH_CLIPS_AT_ONCE} clips" in GUIDE
    assert f"auto: {plan.EVALUATIONS} evaluations" in GUIDE
    assert (plan.LARGEST_BATCH, plan.SMALLEST_BATCH, plan.STEPS_PER_EPOCH) == (128, 8, 8)


def test_other_numbers_are_the_programs():
    from tortoise_hf.config import DataConfig
    from tortoise_hf.machine import PREPARE_TIMEOUT, STEP_TIMEOUT
    from tortoise_hf.presets import PRESETS

    assert STEP_TIMEOUT.total_seconds() == 15 * 60
    assert "15 minutes" in TROUBLE
    assert PREPARE_TIMEOUT.total_seconds() == 12 * 3600
    assert "wait up to 12 hours" in PAGES["several-gpus.md"]
    assert f"under {plan.FEW_TRAIN_CLIPS} clips" in PAGES["recordings.md"]
    data = DataConfig(root="x")
    assert f"{data.min_seconds} s (`data.min_seconds`)" in PAGES["recordings.md"]
    assert f"{data.max_samples / 22_050:.1f} s (`data.max_samples`)" in PAGES["recordings.md"]
    assert f"{data.max_text_ids} text ids" in PAGES["recordings.md"]
    assert plan.PATIENCE == 5
    assert "five" in PAGES["guide.md"]
    rows = re.findall(r"^\| `(\w+)`[^|]*\| (\d+) \| (\d+) \| `([\w+]+)`", PAGES["speaking.md"], flags=re.MULTILINE)
    found = {name: (int(samples), int(steps), sampler) for name, samples, steps, sampler in rows}
    assert found == {
        name: (preset.num_samples, preset.diffusion.steps, preset.diffusion.sampler) for name, preset in PRESETS.items()
    }
