"""Push a folder as one commit: all of it or nothing, however often the connection breaks.

The Hub's state is read first, and only what differs is sent, on the condition that nobody else pushed meanwhile. So
asking again is always right: after a lost answer there is nothing left to send, after a rival's push the difference is
taken anew.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile

from tortoise_hf.hub.client import ATTEMPTS, check_repository, retry
from tortoise_hf.hub.scan import scan_folder

VOICE_FILES = (
    "model.safetensors", "generation_config.json", "*_gpt.pth", "samples/*", "conditioning/*", "latents.safetensors",
    "dvae/*", "adapter/*", "adapter_model.safetensors", "adapter_config.json",
)  # fmt: skip
"""Files of a voice that a newer push may lack; they go then. What else lies in the repository stays."""


@dataclass(frozen=True)
class Pushed:
    """Where a folder went."""

    repo_id: str
    commit: str
    url: str
    changed: bool
    """False if everything was there already."""


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    message: str,
    marker: str,
    private: bool = True,
    revision: str | None = None,
    repo_type: str = "model",
    replaces: Sequence[str] = VOICE_FILES,
    local_paths: Sequence[str | Path] = (),
    attempts: int = ATTEMPTS,
    wait: Callable[[float], object] | None = None,
    endpoint: str | None = None,
) -> Pushed:
    """Make a repository's branch hold a folder, in one commit.

    Args:
        folder: all of its files are pushed; hidden ones aren't.
        repo_id: owner/name; made if it isn't there.
        message: of the commit.
        marker: file in the folder by which the repository is known to be of this kind.
        private: of a new repository.
        revision: branch; made if it isn't there. None: main.
        repo_type: model or dataset.
        replaces: patterns of remote files that are deleted if the folder lacks them.
        local_paths: see `scan_folder`.
        attempts: see `retry`, as for `wait`.
        wait: see there.
        endpoint: the Hub's address; default as HF_ENDPOINT says.

    Raises:
        UserError: if the folder holds a token or a local path, or the Hub refuses or can't be reached.
    """
    scan_folder(folder, local_paths)
    api = HfApi(endpoint=endpoint)
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    additions: dict[str, CommitOperationAdd] = {}

    def once() -> Pushed:
        check_repository(api, repo_id, marker, repo_type)
        url = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        where = {"repo_type": repo_type, "revision": revision}
        head = api.repo_info(repo_id, **where).sha
        tree = api.list_repo_tree(repo_id, recursive=True, repo_type=repo_type, revision=head)
        remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        for name, path in files.items():
            if name not in additions:
                additions[name] = CommitOperationAdd(name, path)  # reads and hashes the file, so only once
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            addition
            for name, addition in additions.items()
            if name not in remote or not _is_equal(addition, files[name], remote[name])
        ]
        operations += [
            CommitOperationDelete(name, is_folder=False)
            for name in remote
            if name not in files and any(fnmatch.fnmatch(name, pattern) for pattern in replaces)
        ]
        if not operations:
            return Pushed(repo_id, head, str(url), False)
        done = api.create_commit(repo_id, operations, commit_message=message, parent_commit=head, **where)
        return Pushed(repo_id, done.oid, str(url), True)

    return retry(once, repo_id, attempts, wait)


def _is_equal(addition: CommitOperationAdd, path: Path, entry: RepoFile) -> bool:
    if addition.upload_info.size != entry.size:
        return False
    if entry.lfs is not None:
        return addition.upload_info.sha256.hex() == entry.lfs.sha256
    return git_blob_id(path) == entry.blob_id


def git_blob_id(path: Path) -> str:
    """The id git gives a file, which is what the Hub records of small ones."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
