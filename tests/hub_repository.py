"""What the test Hub keeps of a repository."""

from __future__ import annotations

import hashlib
import re

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".wav", ".flac", ".mp3", ".zip", ".png")


class Repository:
    """Files of one repository; each revision (40 hex digits) is a full snapshot, `branches` point at revisions."""

    def __init__(self, private: bool = False):
        self.snapshots: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.history: dict[str, list[tuple[str, str]]] = {}
        """Branch -> (revision, title) of its commits, oldest first."""
        self.private = private
        self.gated = False

    def commit(
        self, files: dict[str, bytes], branch: str = "main", revision: str | None = None, title: str = "put"
    ) -> str:
        digest = hashlib.sha1(repr([(path, len(data)) for path, data in sorted(files.items())]).encode())
        digest.update(str(len(self.snapshots)).encode())
        revision = revision or digest.hexdigest()
        self.snapshots[revision] = files
        self.branches[branch] = revision
        self.history.setdefault(branch, []).append((revision, title))
        return revision

    def resolve(self, revision: str) -> str | None:
        revision = self.branches.get(revision, revision)
        return revision if revision in self.snapshots else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.snapshots[self.resolve(revision)]

    def titles(self, branch: str = "main") -> list[str]:
        return [title for _, title in self.history.get(branch, [])]


def is_lfs(path: str, data: bytes) -> bool:
    """Whether the Hub would keep this file in its large-file storage."""
    return (path.endswith(LFS_SUFFIXES) and len(data) > 0) or len(data) > 10_000_000


def git_oid(data: bytes) -> str:
    """The id git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def card_tags(card: str) -> list[str]:
    """What the Hub's search finds a card by."""
    match = re.match(r"^---\n(.*?)\n---", card, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else {}
    return [*data.get("tags", []), *(data[key] for key in ("library_name", "pipeline_tag") if key in data)]
