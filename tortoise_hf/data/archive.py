"""Unpack a dataset archive once, into the cache.

An archive comes from somewhere else: nothing it says about paths, links or sizes is believed. It is unpacked into a
temporary folder that is renamed when complete, so a killed run never leaves half a dataset behind.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock

from tortoise_hf.errors import UserError

MAX_RATIO = 200
"""Most bytes unpacked per byte of archive; recordings pack to no less than about a third."""
ALWAYS_ALLOWED_BYTES = 256 * 2**20
"""Unpacked size below which the ratio doesn't count: a small archive of silent clips packs very well."""
MAX_MEMBERS = 5_000_000
"""Most files in an archive."""
_BLOCK = 1 << 20
_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# What zipfile, tarfile and the decompressors raise on damaged or protected files.
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


def is_archive(path: Path) -> bool:
    """Whether the name of `path` is one of an archive: .zip, .tar, .tar.gz, .tgz, .tar.bz2, .tar.xz."""
    return path.name.lower().endswith((".zip", *_TAR_ENDINGS))


def unpack(archive: Path, cache_dir: Path) -> Path:
    """Unpack `archive` below `cache_dir`, or find it unpacked already.

    The place depends on the archive's path, size and mtime, so a changed archive is unpacked anew. Files keep the
    mtimes written in the archive, so unpacking again makes nothing look changed. Hidden files and `__MACOSX` are left
    out. Several processes may call this at once; one unpacks, the others wait.

    Returns:
        The folder with the archive's contents.

    Raises:
        UserError: if the archive is damaged or protected, holds links or paths that lead out of it, unpacks to absurdly
            much, or the disk is full.
    """
    archive = archive.resolve()
    status = archive.stat()
    key = hashlib.sha256(f"{archive}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()[:16]
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", archive.name.split(".")[0])[:40] or "archive"
    place = cache_dir / "archives" / f"{stem}-{key}"
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(place) + ".lock"):
        if place.is_dir():
            return place
        # Whoever holds the lock is alone: other temporary folders of this archive are of killed runs.
        for leftover in place.parent.glob(f".{place.name}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            _unpack_into(archive, status.st_size, staging)
            # mkdtemp makes the folder private; the unpacked data may be read by whoever reads the cache.
            staging.chmod(place.parent.stat().st_mode & 0o777)
            staging.rename(place)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return place


@dataclass(frozen=True)
class _Member:
    name: str
    mtime: float
    refused: str
    """Why this member can't be unpacked, or ""."""
    handle: zipfile.ZipInfo | tarfile.TarInfo


def _unpack_into(archive: Path, packed_size: int, folder: Path) -> None:
    limit = max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * packed_size)
    unpacked = 0
    try:
        with _open(archive) as (members, open_member):
            for count, member in enumerate(members, start=1):
                if count > MAX_MEMBERS:
                    raise _refusal(archive, f"holds more than {MAX_MEMBERS:,} files")
                if member.refused:
                    raise _refusal(archive, f"holds {member.name!r}, {member.refused}")
                target = _target(archive, member.name, folder)
                if target is None:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with open_member(member.handle) as source, target.open("wb") as sink:
                    # Counted while copying: the sizes an archive declares need not be true.
                    while block := source.read(_BLOCK):
                        unpacked += len(block)
                        if unpacked > limit:
                            raise _refusal(
                                archive, f"unpacks to over {limit / 2**20:,.0f} MiB, far more than it should"
                            )
                        sink.write(block)
                os.utime(target, (member.mtime, member.mtime))
    except UserError:
        raise
    except _DAMAGED as error:
        raise UserError(
            f"{archive} can't be unpacked ({_first_line(error)}); fetch or make it again, without a password."
        ) from error
    except OSError as error:
        raise UserError(
            f"{archive} can't be unpacked into {folder.parent} ({_first_line(error)}); check the disk's free space and "
            "the archive, or choose another place with --data.cache_dir."
        ) from error


def _target(archive: Path, name: str, folder: Path) -> Path | None:
    """Where a member goes; None for a file that isn't needed."""
    name = name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in parts or "\0" in name:
        raise _refusal(archive, f"holds {name!r}, a path that leads out of it")
    if not parts or "__MACOSX" in parts or any(part.startswith(".") for part in parts):
        return None
    return folder.joinpath(*parts)


def _refusal(archive: Path, what: str) -> UserError:
    return UserError(
        f"{archive} {what}, and is not unpacked. If you trust it, unpack it yourself and set data.root to the folder."
    )


@contextmanager
def _open(archive: Path) -> Iterator[tuple[Iterator[_Member], object]]:
    """Yield the files of an archive and a function that opens one of them for reading."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            yield (_zip_member(info) for info in file.infolist() if not info.is_dir()), file.open
    else:
        with tarfile.open(archive, "r:*") as file:

            def open_member(info: tarfile.TarInfo) -> IO[bytes]:
                return file.extractfile(info)

            yield (_tar_member(info) for info in file if not info.isdir()), open_member


def _zip_member(info: zipfile.ZipInfo) -> _Member:
    is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
    try:
        mtime = time.mktime((*info.date_time, 0, 0, -1))
    except (ValueError, OverflowError):
        mtime = 0.0
    return _Member(info.filename, max(mtime, 0.0), "which is a link" if is_link else "", info)


def _tar_member(info: tarfile.TarInfo) -> _Member:
    if info.issym() or info.islnk():
        refused = f"which is a link to {info.linkname!r}"
    else:
        refused = "" if info.isreg() else "which is not a plain file"
    return _Member(info.name, max(float(info.mtime), 0.0), refused, info)


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]
