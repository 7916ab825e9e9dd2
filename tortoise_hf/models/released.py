"""Fetch TorToiSe's released files: pinned by hash, from a local folder, the Hub's cache or the Hub, with mirrors.

A file counts only after its sha256 was compared with a pinned value or, where no value is pinned, with the one the Hub
recorded for it; a size check alone (all the Hub's client does) accepts a flipped byte. Nothing is loaded here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tortoise_hf.errors import UserError
from tortoise_hf.retries import retries_in_one_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """A place on the Hub: repository, path in it, revision (commit or branch)."""

    repo_id: str
    path: str
    revision: str = "main"

    def url(self, endpoint: str | None = None) -> str:
        """Address a browser downloads the file from."""
        return f"{endpoint or constants.ENDPOINT}/{self.repo_id}/resolve/{self.revision}/{self.path}"


@dataclass(frozen=True)
class ReleasedFile:
    """A file of the release: its plain name, where it is kept, in order of preference, and its sha256 if we know it."""

    name: str
    origins: tuple[Origin, ...]
    sha256: str | None = None


_MAIN_REPO = "jbetker/tortoise-tts-v2"
_MIRROR_REPO = "Manmay/tortoise-tts"  # what tortoise-tts 3.0 itself downloads from

# Hashes: tokenizer.json and mel_norms.pth hashed from the copies inside tortoise-tts 3.0.0; dvae.pth from the README of
# 152334H/DL-Art-School, as is the revision that still held the file. Nobody published one for autoregressive.pth, so it
# is compared with what the Hub recorded at upload.
RELEASED = {
    file.name: file
    for file in (
        ReleasedFile(
            "autoregressive.pth",
            (Origin(_MAIN_REPO, ".models/autoregressive.pth"), Origin(_MIRROR_REPO, "autoregressive.pth")),
        ),
        ReleasedFile(
            "dvae.pth",
            (
                Origin(_MAIN_REPO, ".models/dvae.pth", "3704aea61678e7e468a06d8eea121dba368a798e"),
                Origin("Gatozu35/tortoise-tts", "dvae.pth"),
                Origin(_MIRROR_REPO, "dvae.pth"),
            ),
            "a990825371506c16bcf0e8167bf24ccf82f65bb6a1dbcbfcf058d76f9b197e35",
        ),
        ReleasedFile(
            "tokenizer.json",
            (Origin(_MAIN_REPO, "tortoise/data/tokenizer.json"), Origin(_MIRROR_REPO, "tokenizer.json")),
            "d1fa6e9b4741bb75b284331b833347c166ba8b0518e187f7370f123149ed87bb",
        ),
        ReleasedFile(
            "mel_norms.pth",
            (Origin(_MAIN_REPO, "tortoise/data/mel_norms.pth"), Origin(_MIRROR_REPO, "mel_norms.pth")),
            "1f69422a8a8f344c4fca2f0c6b8d41d2151d6615b7321e48e6bb15ae949b119c",
        ),
    )
}

# What speaking takes besides. Nobody published hashes, so these too are compared with what the Hub recorded.
SPEAKING = {
    name: ReleasedFile(name, (Origin(_MIRROR_REPO, name), Origin(_MAIN_REPO, f".models/{name}")))
    for name in ("clvp2.pth", "diffusion_decoder.pth", "vocoder.pth", "rlg_auto.pth", "rlg_diffuser.pth")
}


def _released(name: str) -> ReleasedFile:
    return RELEASED[name] if name in RELEASED else SPEAKING[name]


@dataclass(frozen=True)
class FetchedFile:
    """A released file at hand.

    `compared_with` names what its sha256 was compared with: "pinned", "hub" (recorded at upload) or "nothing" (a local
    file whose hash nobody published).
    """

    path: Path
    origin: str
    sha256: str
    compared_with: str


@retries_in_one_line()
def fetch_released(
    names: Iterable[str],
    weights_dir: str | Path | None = None,
    *,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
    offline: bool | None = None,
    option: str = "model.weights_dir",
) -> dict[str, FetchedFile]:
    """Bring released files here: from weights_dir, else from the Hub's cache, else from the Hub and its mirrors.

    Args:
        names: keys of `RELEASED` or `SPEAKING`.
        weights_dir: folder with the files under their plain names or the repository's paths, or another program's
            download cache (tortoise-tts keeps one in ~/.cache/tortoise/models).
        cache_dir: the Hub's cache; default as HF_HOME and HF_HUB_CACHE say.
        endpoint: the Hub's address; default as HF_ENDPOINT says.
        offline: take what is on this machine only; default as HF_HUB_OFFLINE says.
        option: what the user passes weights_dir as, for messages.

    Returns: a `FetchedFile` for each name.

    Raises:
        UserError: if a file is nowhere to be had or its sha256 is wrong. All such files are named in one message, with
            their addresses and how to bring them by hand.
    """
    names = list(dict.fromkeys(names))
    if weights_dir is not None and not Path(weights_dir).is_dir():
        raise UserError(f"{option}: {weights_dir} is not a folder; put {', '.join(names)} in one.")
    fetched: dict[str, FetchedFile] = {}
    failures: dict[str, list[str]] = {}
    offline = constants.HF_HUB_OFFLINE if offline is None else offline
    for name in names:
        file = _released(name)
        local = _find_local(file, Path(weights_dir)) if weights_dir is not None else None
        if local is not None:
            fetched[name] = _check_local(file, local)
            continue
        reasons = failures[name] = []
        for origin in file.origins:
            try:
                path = Path(
                    hf_hub_download(
                        origin.repo_id,
                        origin.path,
                        revision=origin.revision,
                        cache_dir=cache_dir,
                        endpoint=endpoint,
                        local_files_only=offline,
                    )
                )
                fetched[name] = _check_fetched(file, origin, path, endpoint, offline)
            except _WrongHashError as error:
                reasons.append(str(error))
            except Exception as error:  # whatever the client's HTTP library raises; the next origin may be up
                reasons.append(f"{origin.url(endpoint)}: {_reason(error)}")
                # Without a network each further question would only wait for its timeout; the cache is still asked.
                offline = offline or _is_connection_failure(error)
            else:
                del failures[name]
                if reasons:
                    logger.warning("%s comes from %s. %s", name, fetched[name].origin, ". ".join(reasons))
                break
    if failures:
        raise UserError(_missing_message(failures, weights_dir, endpoint, option))
    return fetched


class _WrongHashError(Exception):
    """A file arrived whose content isn't what it should be."""


def file_sha256(path: str | Path) -> str:
    """Sha256 of a file's content, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_in_cache(path: Path) -> str | None:
    """What the Hub announced of a file in its client's cache: the sha256 of a large one, git's id of a small one.

    The client names the content by it and links to that. One link is followed only: behind it, content that came by xet
    may lie under xet's own hash. None where the file system has no links.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", name) else None


def delete_from_cache(path: Path) -> None:
    """Delete a file of the client's cache with its content, so that the cache doesn't give it out again."""
    while path.is_symlink():
        content = path.parent / os.readlink(path)
        path.unlink()
        path = content
    path.unlink(missing_ok=True)


def _find_local(file: ReleasedFile, folder: Path) -> Path | None:
    for candidate in (file.name, *(origin.path for origin in file.origins)):
        if (folder / candidate).is_file():
            return folder / candidate
    for origin in file.origins:  # another program's download cache, laid out by the same client
        snapshots = folder / f"models--{origin.repo_id.replace('/', '--')}" / "snapshots"
        for path in sorted(snapshots.glob(f"*/{origin.path}")):
            return path
    return None


def _check_local(file: ReleasedFile, path: Path) -> FetchedFile:
    sha256 = file_sha256(path)
    if file.sha256 is not None and sha256 != file.sha256:
        raise UserError(
            f"{path} is not the released {file.name}: its sha256 is {sha256}, expected {file.sha256}. "
            f"Download it again from {file.origins[0].url()}, or use your own file through a base folder (model.base)."
        )
    return FetchedFile(path, str(path), sha256, "nothing" if file.sha256 is None else "pinned")


def _check_fetched(file: ReleasedFile, origin: Origin, path: Path, endpoint: str | None, offline: bool) -> FetchedFile:
    expected, compared_with = file.sha256, "pinned"
    if expected is None:
        expected, compared_with = _recorded_sha256(origin, path, endpoint, offline), "hub"
    sha256 = file_sha256(path)
    if expected is None:
        compared_with = "nothing"
        logger.warning("%s: the sha256 of %s could not be compared with anything", origin.url(endpoint), path)
    elif sha256 != expected:
        raise _WrongHashError(
            f"{origin.url(endpoint)}: refused, the file that arrived has sha256 {sha256}, expected {expected}; "
            f"if the download was damaged, delete {path.resolve()} and start again"
        )
    return FetchedFile(path, f"{origin.repo_id}/{origin.path} at {origin.revision}", sha256, compared_with)


def _recorded_sha256(origin: Origin, path: Path, endpoint: str | None, offline: bool) -> str | None:
    # Works offline too; where the file system has no links the Hub is asked.
    known = hash_in_cache(path)
    if known is not None and len(known) == 64:
        return known
    if offline:
        return None
    entries = HfApi(endpoint=endpoint).get_paths_info(origin.repo_id, [origin.path], revision=origin.revision)
    return next((entry.lfs.sha256 for entry in entries if getattr(entry, "lfs", None)), None)


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_connection_failure(error: BaseException) -> bool:
    # By name: which HTTP library lies underneath changes between the client's versions.
    return any(re.search(r"Connect|OfflineMode", type(link).__name__) for link in _chain(error))


def _reason(error: BaseException) -> str:
    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return "not in the cache, and HF_HUB_OFFLINE forbids asking the Hub"
        cause = error.__cause__
        if cause is None or _is_connection_failure(cause):
            return "not in the cache, and the Hub could not be reached"
        return f"not in the cache, and the Hub answered {_first_line(cause)}"
    if isinstance(error, RepositoryNotFoundError | EntryNotFoundError | RevisionNotFoundError):
        return "the Hub has no such file"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def _missing_message(
    failures: dict[str, list[str]], weights_dir: str | Path | None, endpoint: str | None, option: str
) -> str:
    lines = [f"{len(failures)} released file(s) could not be fetched:"]
    for name, reasons in failures.items():
        file = _released(name)
        lines.append(f"  {name}" + (f" (sha256 {file.sha256})" if file.sha256 else ""))
        lines += [f"    {reason}" for reason in reasons]
    folder = weights_dir or "FOLDER"
    lines.append(
        f"Connect this machine, or download them elsewhere, put them under these names into a folder and pass "
        f"--{option} {folder}; a copy of another machine's ~/.cache/huggingface works too."
    )
    first = _released(next(iter(failures)))
    lines.append(f"For instance: curl -L -o {folder}/{first.name} {first.origins[0].url(endpoint)}")
    return "\n".join(lines)
