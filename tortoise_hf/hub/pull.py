"""Bring a voice here from the Hub, or refuse it, before anything of it is loaded.

The Hub's client compares sizes only, so each file's hash is compared with what the Hub recorded at upload. Names, sizes
and the shapes of tensors are looked at first: whoever made the repository may have meant harm.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from tortoise_hf.adapter_files import ADAPTER_FILES
from tortoise_hf.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from tortoise_hf.errors import UserError
from tortoise_hf.hub.client import explain, is_full, is_passing
from tortoise_hf.hub.contents import CONFIG, MOST_JSON_BYTES, WEIGHTS, check_contents
from tortoise_hf.hub.push import git_blob_id
from tortoise_hf.latents import LATENTS_NAME
from tortoise_hf.models.released import delete_from_cache, file_sha256, hash_in_cache
from tortoise_hf.retries import retries_in_one_line

NEEDED = (
    CONFIG, WEIGHTS, "tokenizer.json", "mel_norms.safetensors", "dvae/config.json", "dvae/model.safetensors",
    "export.json", "training_summary.json", LATENTS_NAME,
)  # fmt: skip
"""Files of a voice that are pulled if they are there."""
CONDITIONING = re.compile(r"^conditioning/[^/]+\.(wav|flac|safetensors|json)$")
PUBLISHED_WEIGHTS = re.compile(r"^\d+_gpt\.pth$")
MOST_FILES = 10_000
MOST_BYTES = {".json": MOST_JSON_BYTES, ".wav": 100_000_000, ".flac": 100_000_000}
"""Largest file taken, by suffix."""
MOST_WEIGHT_BYTES = 20_000_000_000
MOST_ADAPTER_BYTES = 2_000_000_000
"""Above an adapter of the largest rank in all layers of TorToiSe's GPT, 0.5 GB."""
MOST_CONDITIONING_FILES = 100
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def is_hub_name(text: str) -> bool:
    """Whether `text` has the form owner/name or owner/name@revision and nothing on this machine has its name."""
    return bool(_HUB_NAME.fullmatch(text)) and not Path(text).exists() and not Path(text.split("/")[0]).is_dir()


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
        cache_dir: see `pull_repository`, as for endpoint and offline.
        endpoint: see there.
        offline: see there.

    Returns: a folder in the cache, named by the commit. Where the voice is an adapter, its base isn't there yet; see
        `models.pretrained.resolve_base`.

    Raises:
        UserError: as `pull_repository`.
    """
    if Path(name_or_folder).expanduser().is_dir():
        return Path(name_or_folder).expanduser()
    repo_id, _, named = str(name_or_folder).partition("@")
    if revision and named and revision != named:
        raise UserError(f"{name_or_folder} names the revision {named}, and {revision} was asked for as well; give one.")
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise UserError(
            f"{name_or_folder} is neither a folder on this machine nor the name of a voice on the Hub (owner/name)."
        ) from error
    return pull_repository(repo_id, revision or named or None, cache_dir=cache_dir, endpoint=endpoint, offline=offline)


@retries_in_one_line()
def pull_repository(
    repo_id: str,
    revision: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
    offline: bool | None = None,
) -> Path:
    """Folder of a voice on the Hub, even where a folder on this machine has the same name.

    Args:
        repo_id: owner/name.
        revision: branch, tag or commit; None takes the newest.
        cache_dir: the Hub's cache; default as HF_HOME and HF_HUB_CACHE say.
        endpoint: the Hub's address; default as HF_ENDPOINT says.
        offline: ask the cache only; default as HF_HUB_OFFLINE says. Without a connection the cache is asked as well.

    Raises:
        UserError: if there is no such voice, it may not be read, it isn't one, something about it is wrong or
            dangerous, or the disk is full.
    """
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
        elif entries.keys() >= set(ADAPTER_FILES):
            chosen |= {name: entries[name] for name in ADAPTER_FILES}
    missing = [name for name in (CONFIG, "tokenizer.json") if name not in chosen]
    if missing or not any(_is_weights(name) for name in chosen):
        lacks = " and ".join(missing or [WEIGHTS])
        raise UserError(f"{repo_id} is not a voice of this program: it has no {lacks}. Nothing was pulled.")
    if sum(1 for name in chosen if name.startswith("conditioning/")) > MOST_CONDITIONING_FILES:
        raise UserError(f"{repo_id} holds more than {MOST_CONDITIONING_FILES} reference clips. Nothing was pulled.")
    for name, entry in chosen.items():
        largest = MOST_ADAPTER_BYTES if name == ADAPTER_WEIGHTS else MOST_WEIGHT_BYTES
        most = MOST_BYTES.get(PurePosixPath(name).suffix, largest)
        if entry.size > most:
            raise UserError(
                f"{repo_id}/{name} has {entry.size:,} bytes; at most {most:,} are taken. Nothing was pulled."
            )
    return chosen


def _is_weights(name: str) -> bool:
    """Whether a file of a voice is its weights, whole or an adapter's."""
    return name in (WEIGHTS, ADAPTER_WEIGHTS) or (name.endswith(".pth") and "/" not in name)


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
    known = {*NEEDED, *ADAPTER_FILES}
    wanted = [name for name in names if name in known or CONDITIONING.match(name) or PUBLISHED_WEIGHTS.match(name)]
    whole = set(ADAPTER_FILES) <= set(wanted) or ADAPTER_WEIGHTS not in wanted
    if CONFIG not in wanted or not whole or not any(_is_weights(name) for name in wanted):
        raise UserError(f"{reason} The cache holds only a part of {repo_id}; pull it again when the Hub can be had.")
    for name in wanted:
        recorded = hash_in_cache(folder / name)
        if recorded is not None:
            compare(folder / name, recorded, f"{repo_id}/{name}")
    check_contents(folder, repo_id)
    return folder
