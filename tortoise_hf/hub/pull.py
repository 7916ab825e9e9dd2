"""Bring a voice here from the Hub, or refuse it, before anything of it is loaded.

The Hub's client compares sizes only, so each file's hash is compared with what the Hub recorded at upload. Names, sizes
and the shapes of tensors are looked at first: whoever made the repository may have meant harm.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from tortoise_hf.errors import UserError
from tortoise_hf.hub.client import explain, is_full, is_passing
from tortoise_hf.hub.push import git_blob_id
from tortoise_hf.latents import LATENTS_NAME
from tortoise_hf.models.checkpoint_formats import published_layout, read_gpt_weights
from tortoise_hf.models.gpt import GPTConfig
from tortoise_hf.models.released import delete_from_cache, file_sha256, hash_in_cache
from tortoise_hf.retries import retries_in_one_line

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
NEEDED = (
    CONFIG, WEIGHTS, "tokenizer.json", "mel_norms.safetensors", "dvae/config.json", "dvae/model.safetensors",
    "export.json", "training_summary.json", LATENTS_NAME,
)  # fmt: skip
"""Files of a voice that are pulled if they are there."""
CONDITIONING = re.compile(r"^conditioning/[^/]+\.(wav|flac|safetensors|json)$")
PUBLISHED_WEIGHTS = re.compile(r"^\d+_gpt\.pth$")
MOST_FILES = 10_000
MOST_BYTES = {".json": 20_000_000, ".wav": 100_000_000, ".flac": 100_000_000}
"""Largest file taken, by suffix. The largest JSON of a voice is its tokenizer, a few hundred kB."""
MOST_WEIGHT_BYTES = 20_000_000_000
MOST_CONDITIONING_FILES = 100
LARGEST = {
    "num_layers": 200, "hidden_size": 8192, "num_heads": 256, "num_text_tokens": 100_000, "max_text_tokens": 100_000,
    "num_mel_codes": 100_000, "max_mel_tokens": 100_000, "max_conditioning_inputs": 100, "num_mel_bins": 1000,
    "num_conditioning_layers": 100,
}  # fmt: skip
"""Largest sizes a config may name: far above any GPT of TorToiSe, far below what harms a machine."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def is_hub_name(text: str) -> bool:
    """Whether `text` has the form owner/name or owner/name@revision and nothing on this machine has its name."""
    return bool(_HUB_NAME.fullmatch(text)) and not Path(text).exists() and not Path(text.split("/")[0]).is_dir()


@retries_in_one_line()
def pull_voice(
    name_or_folder: str | Path,
    revision: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
    offline: bool | None = None,
) -> Path:
    """Folder of a voice, every file of it checked.

    Args:
        name_or_folder: owner/name or owner/name@revision on the Hub, or a folder on this machine (given back as it is).
        revision: branch, tag or commit; None takes the newest.
        cache_dir: the Hub's cache; default as HF_HOME and HF_HUB_CACHE say.
        endpoint: the Hub's address; default as HF_ENDPOINT says.
        offline: ask the cache only; default as HF_HUB_OFFLINE says. Without a connection the cache is asked as well.

    Returns: a folder in the cache, named by the commit.

    Raises:
        UserError: if there is no such voice, it may not be read, it isn't one, something about it is wrong or
            dangerous, or the disk is full.
    """
    if Path(name_or_folder).expanduser().is_dir():
        return Path(name_or_folder).expanduser()
    repo_id, _, named = str(name_or_folder).partition("@")
    if revision and named and revision != named:
        raise UserError(f"{name_or_folder} names the revision {named}, and {revision} was asked for as well; give one.")
    revision = revision or named or None
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise UserError(
            f"{name_or_folder} is neither a folder on this machine nor the name of a voice on the Hub (owner/name)."
        ) from error
    offline = constants.HF_HUB_OFFLINE if offline is None else offline
    if not offline:
        try:
            return _pull(HfApi(endpoint=endpoint), repo_id, revision, cache_dir)
        except UserError:
            raise
        except Exception as error:  # whatever the client's HTTP library raises
            if is_full(error):
                where = cache_dir or constants.HF_HUB_CACHE
                raise UserError(
                    f"The disk is full: {repo_id} did not fit into {where}. Free some space, or set HF_HOME to another "
                    "disk, and pull again."
                ) from error
            if not is_passing(error):
                raise UserError(explain(error, repo_id, revision)) from error
            reason = explain(error, repo_id, revision)
    else:
        reason = "HF_HUB_OFFLINE forbids asking the Hub."
    return _from_cache(repo_id, revision, cache_dir, reason)


def _pull(api: HfApi, repo_id: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    commit = api.model_info(repo_id, revision=revision or constants.DEFAULT_REVISION).sha
    tree = list(islice(api.list_repo_tree(repo_id, recursive=True, revision=commit), MOST_FILES + 1))
    files = choose_files(repo_id, tree)
    check_space(files.values(), Path(cache_dir or constants.HF_HUB_CACHE), repo_id)
    folder = None
    for name, entry in files.items():
        path = Path(hf_hub_download(repo_id, name, revision=commit, cache_dir=cache_dir, endpoint=api.endpoint))
        folder = path.parents[len(PurePosixPath(name).parts) - 1]
        recorded = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
        compare(path, recorded, f"{repo_id}/{name}")
    check_contents(folder, repo_id)
    # Written last, so that without a connection this name leads to what was checked.
    reference = _repository_cache(repo_id, cache_dir) / "refs" / (revision or constants.DEFAULT_REVISION)
    if is_safe_name(revision or "main"):
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit, encoding="utf-8")
    return folder


def _repository_cache(repo_id: str, cache_dir: str | Path | None) -> Path:
    return Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"


def choose_files(repo_id: str, tree: Iterable[Any]) -> dict[str, RepoFile]:
    """The files of a voice in a repository's listing.

    Raises:
        UserError: if it isn't a voice, or its names or sizes aren't those of one.
    """
    tree = list(tree)
    if len(tree) > MOST_FILES:
        raise UserError(f"{repo_id} lists more than {MOST_FILES:,} files; a voice has a few dozen. Nothing was pulled.")
    for entry in tree:
        if not is_safe_name(entry.path):
            raise UserError(
                f"{repo_id} lists a file named {entry.path!r}, which would be written outside its folder. Nothing was "
                "pulled."
            )
    entries = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    chosen = {name: entry for name, entry in entries.items() if name in NEEDED or CONDITIONING.match(name)}
    if WEIGHTS not in entries:
        published = [name for name in entries if PUBLISHED_WEIGHTS.match(name) or name == "autoregressive.pth"]
        if len(published) == 1:
            chosen[published[0]] = entries[published[0]]
    missing = [name for name in (CONFIG, "tokenizer.json") if name not in chosen]
    if missing or not any(name.endswith((".pth", WEIGHTS)) and "/" not in name for name in chosen):
        lacks = " and ".join(missing or [WEIGHTS])
        raise UserError(f"{repo_id} is not a voice of this program: it has no {lacks}. Nothing was pulled.")
    if sum(1 for name in chosen if name.startswith("conditioning/")) > MOST_CONDITIONING_FILES:
        raise UserError(f"{repo_id} holds more than {MOST_CONDITIONING_FILES} reference clips. Nothing was pulled.")
    for name, entry in chosen.items():
        most = MOST_BYTES.get(PurePosixPath(name).suffix, MOST_WEIGHT_BYTES)
        if entry.size > most:
            raise UserError(
                f"{repo_id}/{name} has {entry.size:,} bytes; at most {most:,} are taken. Nothing was pulled."
            )
    return chosen


def is_safe_name(name: str) -> bool:
    """Whether a remote file name stays inside the folder it is written to, on any system."""
    parts = name.split("/")
    return not (
        name.startswith("/")
        or "\\" in name
        or ":" in parts[0]
        or any(part in ("", ".", "..") for part in parts)
        or any(ord(character) < 32 for character in name)
    )


def check_space(files: Iterable[RepoFile], cache: Path, repo_id: str) -> None:
    """Refuse what wouldn't fit on the disk.

    Raises: UserError: with the figures.
    """
    there = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    needed, free = sum(entry.size for entry in files), shutil.disk_usage(there).free
    present = _repository_cache(repo_id, cache) / "blobs"
    if present.is_dir():
        needed -= sum(path.stat().st_size for path in present.iterdir() if path.is_file())
    if needed > free:
        raise UserError(
            f"{repo_id} needs {needed / 1e9:.2f} GB and the disk of {cache} has {free / 1e9:.2f} GB left. Free some "
            "space, or set HF_HOME to another disk."
        )


def compare(path: Path, recorded: str, name: str) -> None:
    """Refuse a file that isn't what the Hub recorded (sha256 of a large one, git's id of a small one), and delete it.

    Raises: UserError.
    """
    found = file_sha256(path) if len(recorded) == 64 else git_blob_id(path)
    if found == recorded:
        return
    size = path.stat().st_size
    delete_from_cache(path)
    raise UserError(
        f"{name} arrived damaged: {size:,} bytes with hash {found[:12]}..., the Hub recorded {recorded[:12]}.... It "
        "was deleted and nothing was loaded; pull again."
    )


def _from_cache(repo_id: str, revision: str | None, cache_dir: str | Path | None, reason: str) -> Path:
    cache = _repository_cache(repo_id, cache_dir)
    reference = cache / "refs" / (revision or constants.DEFAULT_REVISION)
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision or ""
    folder = cache / "snapshots" / commit
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or not folder.is_dir():
        raise UserError(f"{reason} It is not in the cache either; pull it again when the Hub can be had.")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    wanted = [name for name in names if name in NEEDED or CONDITIONING.match(name) or PUBLISHED_WEIGHTS.match(name)]
    if CONFIG not in wanted or not any(name.endswith((".pth", WEIGHTS)) and "/" not in name for name in wanted):
        raise UserError(f"{reason} The cache holds only a part of {repo_id}; pull it again when the Hub can be had.")
    for name in wanted:
        recorded = hash_in_cache(folder / name)
        if recorded is not None:
            compare(folder / name, recorded, f"{repo_id}/{name}")
    check_contents(folder, repo_id)
    return folder


def check_contents(folder: Path, name: str) -> None:
    """Whether a voice's files say of themselves what a voice's may: JSON that parses, sizes and shapes within reason.

    Raises:
        UserError: what is wrong. Tensors are not read yet, but for pickled weights, which are opened without code.
    """
    for path in sorted(folder.glob("**/*.json")):
        read_json(path, f"{name}/{path.relative_to(folder).as_posix()}")
    config = gpt_config(read_json(folder / CONFIG, f"{name}/{CONFIG}"), name)
    layout = {key: shape for key, (shape, _) in published_layout(config, attention_buffers=False).items()}
    if (folder / WEIGHTS).is_file():
        shapes = safetensors_shapes(folder / WEIGHTS, f"{name}/{WEIGHTS}")
    else:
        path = next(path for path in folder.glob("*.pth"))
        shapes = {key: tuple(tensor.shape) for key, tensor in read_gpt_weights(path).items()}
    wrong = [key for key in layout.keys() | shapes.keys() if layout.get(key) != shapes.get(key)]
    if wrong:
        key = min(wrong)
        raise UserError(
            f"{name}: weights and {CONFIG} don't belong together: {len(wrong)} of {len(layout)} tensors differ, first "
            f"{key} ({shapes.get(key, 'missing')} instead of {layout.get(key, 'nothing')}). Nothing was loaded."
        )
    for path in (file for file in folder.rglob("*.safetensors") if file != folder / WEIGHTS):
        shapes = safetensors_shapes(path, f"{name}/{path.relative_to(folder).as_posix()}")
        if path == folder / LATENTS_NAME and shapes.get("gpt") != (1, config.hidden_size):
            raise UserError(
                f"{name}/{LATENTS_NAME} holds {shapes.get('gpt', 'nothing')} for the GPT, expected "
                f"{(1, config.hidden_size)}. Nothing was loaded."
            )


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON file of someone else.

    Raises: UserError: if it is too large, isn't JSON, is nested too deeply, or isn't an object.
    """
    try:
        if path.stat().st_size > MOST_BYTES[".json"]:
            raise UserError(f"{name} has {path.stat().st_size:,} bytes; at most {MOST_BYTES['.json']:,} are read.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} can't be read as JSON ({type(error).__name__}). Nothing was loaded.") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} holds {type(value).__name__}, expected an object. Nothing was loaded.")
    return value


def gpt_config(values: Mapping[str, Any], name: str) -> GPTConfig:
    """The sizes of a voice's GPT.

    Raises: UserError: if it is another model's config, or names absurd sizes.
    """
    if values.get("model_type") != GPTConfig.model_type:
        raise UserError(
            f"{name} is not a voice of this program: its {CONFIG} describes model_type {values.get('model_type')!r}, "
            f"expected {GPTConfig.model_type!r}."
        )
    for key, most in LARGEST.items():
        value = values.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise UserError(
                f"{name}: {CONFIG} names {key} {value!r}; expected a whole number from 1 to {most:,}. Nothing was "
                "loaded."
            )
    try:
        return GPTConfig.from_dict({key: values[key] for key in LARGEST if key in values})
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {CONFIG} is not usable ({error}).") from error


def safetensors_shapes(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes out of a file's header, which must account for every byte of the file.

    Raises: UserError: if it doesn't.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if not 2 <= length <= min(size - 8, MOST_BYTES[".json"]):
                raise ValueError(f"its header claims {length:,} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if max(ends, default=0) != size - 8 - length:
            raise ValueError("its tensors don't fill the file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise UserError(f"{name} is not a sound safetensors file ({error}). Nothing was loaded.") from error
    return shapes


def copy_voice(folder: Path, target: Path) -> None:
    """Put a pulled voice into a folder of one's own, without links into the cache.

    Raises: UserError: if the folder holds something already.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty; name a folder that isn't there yet.")
    staging = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        # Content alone: files of the cache may be read-only.
        shutil.copytree(folder, staging, ignore=shutil.ignore_patterns(".*"), copy_function=shutil.copyfile)
        if target.is_dir():
            target.rmdir()
        staging.rename(target)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"{target} can't be written ({error.strerror or error}).") from error
