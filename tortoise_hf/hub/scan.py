"""What must not leave this machine: access tokens, and names of its folders."""

from __future__ import annotations

import json
import mmap
import re
import struct
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import get_token

from tortoise_hf.errors import UserError

_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,})\b")
# Not inside a longer word or an address: https://host/data/x names no folder here.
_LOCAL_PATH = re.compile(
    r"(?<![\w:/.~-])(?:/(?:home|Users|root|mnt|media|content|tmp|var|workspace|scratch|kaggle)/[\w.@+-]+"
    r"|[A-Za-z]:\\{1,2}(?:Users|Documents)\b[\w\\.-]*)"
)
_BEGINNING = 8192


def scan_folder(folder: Path, local_paths: Iterable[str | Path] = ()) -> None:
    """Read everything that would be uploaded.

    Args:
        folder: what would be uploaded.
        local_paths: folders of this machine that no text may name, besides the usual places.

    Raises:
        UserError: naming file and finding, if there is a token or a local path; the token itself is not shown.
    """
    token = (get_token() or "").encode()
    names = {str(path) for path in local_paths if len(Path(path).parts) > 2 and Path(path).is_absolute()}
    names.add(str(Path.home())) if len(Path.home().parts) > 2 else None
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = path.relative_to(folder).as_posix()
        if _contains(path, token):
            raise UserError(f"{name} holds your access token for the Hub, so nothing was pushed. Take it out.")
        text = _text_of(path)
        if text is None:
            continue
        if _TOKEN.search(text):
            raise UserError(f"{name} holds what looks like an access token, so nothing was pushed. Take it out.")
        found = next((known for known in names if known in text), None) or _LOCAL_PATH.search(text)
        if found:
            found = found if isinstance(found, str) else found[0]
            raise UserError(f"{name} names a folder of this machine ({found}), so nothing was pushed. Take it out.")


def _contains(path: Path, wanted: bytes) -> bool:
    if not wanted or path.stat().st_size < len(wanted):
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(wanted) >= 0


def _text_of(path: Path) -> str | None:
    """A file's text, or the header of weights; None for other binary files."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            length = struct.unpack("<Q", file.read(8))[0]
            return json.dumps(json.loads(file.read(length)).get("__metadata__", {}))
        beginning = file.read(_BEGINNING)
        if b"\0" in beginning:
            return None
        return (beginning + file.read()).decode("utf-8", errors="replace")
