"""A Hub on loopback for tests and the demo: enough of the Hub's HTTP interface for its genuine client to work against.

    with HubServer() as hub:
        hub.put("owner/name", "folder/file.bin", b"...")
        hf_hub_download("owner/name", "folder/file.bin", endpoint=hub.url, cache_dir=tmp_path)

As a program it serves until Ctrl-C, for trying out pushes and pulls without the Hub: `python tests/hub_server.py`.

Large files go the ways they go on the Hub: LFS (one part or several) or xet (`hub_xet.py`) up; a redirect to another
host, with the sha256 as linked ETag, down. Datasets are repositories named `datasets/owner/name`. Without `accounts`
everybody may do everything. `faults` makes requests go wrong. Routes are methods named `on_<METHOD>_<what>`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml
from hub_http import Fault, Handler
from hub_repository import Repository, card_tags, git_oid, is_lfs
from hub_transfer import Transfers
from hub_xet import XetStore

REPO = r"(?P<repo>(?:datasets/)?[^/]+/[^/]+)"
API_REPO = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"


@dataclass
class Account:
    """Whom a token belongs to, and what it may do."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


class HubServer(Transfers):
    """The server; `url` is its endpoint. `requests` lists (method, path) of every request it got."""

    def __init__(self, port: int = 0):
        """Listen on a port of loopback; 0 takes a free one."""
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken: dict[str, int] = {}
        """Repository id -> status with which every request for it is answered."""
        self.recorded_sha256: dict[str, str] = {}
        """File path -> sha256 the Hub claims for it instead of the true one."""
        self.served: dict[str, bytes] = {}
        """File path -> content that is sent instead of the true one."""
        self.accounts: dict[str, Account] = {}
        """Token -> account; empty: nobody is asked for a token."""
        self.faults: list[Fault] = []
        self.bytes_per_second: float | None = None
        """How fast uploads are taken in; None: as fast as they come."""
        self.part_bytes = 8_000_000
        """LFS files above this size go up in parts of it."""
        self.page_size = 1000
        self.objects: dict[str, bytes] = {}
        """LFS content by sha256, whether or not a commit names it."""
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.RLock()
        self.xet = XetStore(self)
        self.routes = [
            (re.compile(rf"^/blob/{REPO}/(?P<revision>[0-9a-f]{{40}})/(?P<path>.+)$"), "blob"),
            (re.compile(rf"^/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)$"), "resolve"),
            (re.compile(rf"^/{REPO}\.git/info/lfs/objects/batch$"), "lfs_batch"),
            (re.compile(r"^/lfs/(?P<sha256>[0-9a-f]{64})(?:/(?P<part>\d+))?$"), "lfs"),
            (re.compile(r"^/api/whoami-v2$"), "whoami"),
            (re.compile(r"^/api/repos/create$"), "create"),
            (re.compile(r"^/api/validate-yaml$"), "validate_yaml"),
            (re.compile(r"^/api/models$"), "models"),
            (re.compile(rf"^{API_REPO}(?:/revision/(?P<revision>[^/]+))?$"), "info"),
            (re.compile(rf"^{API_REPO}/refs$"), "refs"),
            (re.compile(rf"^{API_REPO}/branch/(?P<branch>[^/]+)$"), "branch"),
            (re.compile(rf"^{API_REPO}/commits/(?P<revision>[^/]+)$"), "commits"),
            (re.compile(rf"^{API_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?$"), "tree"),
            (re.compile(rf"^{API_REPO}/paths-info/(?P<revision>[^/]+)$"), "paths_info"),
            (re.compile(rf"^{API_REPO}/preupload/(?P<revision>[^/]+)$"), "preupload"),
            (re.compile(rf"^{API_REPO}/commit/(?P<revision>[^/]+)$"), "commit"),
            (re.compile(rf"^{API_REPO}/xet-(?P<use>read|write)-token/(?P<revision>[^/]+)$"), "xet_token"),
            (re.compile(r"^/xet/(?P<rest>.+)$"), "xet"),
        ]
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def repository(self, repo_id: str) -> Repository:
        return self.repositories.setdefault(repo_id, Repository())

    def put(self, repo_id: str, path: str, data: bytes, branch: str = "main", revision: str | None = None) -> str:
        """Add a file in a new commit; gives the commit's id."""
        repository = self.repository(repo_id)
        before = repository.snapshots.get(repository.branches.get(branch, ""), {})
        return repository.commit({**before, path: data}, branch, revision)

    def fail(self, method: str, path: str, what: int | str | Callable, times: int = 1, **headers: str) -> None:
        """Make the next requests whose path matches a pattern go wrong."""
        self.faults.append(
            Fault(method, path, what, times, {name.replace("_", "-"): text for name, text in headers.items()})
        )

    def sha256(self, path: str, data: bytes) -> str:
        return self.recorded_sha256.get(path, hashlib.sha256(data).hexdigest())

    # Accounts

    def account(self, request: Handler) -> Account | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.accounts.get(token)

    def may_write(self, request: Handler, repo: str) -> bool:
        if not self.accounts:
            return True
        account = self.account(request)
        owner = repo.removeprefix("datasets/").split("/")[0]
        return account is not None and account.role == "write" and owner in (account.name, *account.orgs)

    def refuse_reader(self, request: Handler, repo: str) -> bool:
        """Answer and give True if the repository isn't there for whoever asks."""
        repository = self.repositories.get(repo)
        account = self.account(request)
        if repository is None or (repository.private and self.accounts and not self.may_read(account, repo)):
            request.refuse(404 if account or not self.accounts else 401, "RepoNotFound")
            return True
        if repository.gated and not (account and self.may_read(account, repo)):
            request.refuse(403, "GatedRepo")
            return True
        return False

    def may_read(self, account: Account | None, repo: str) -> bool:
        return account is not None and repo.removeprefix("datasets/").split("/")[0] in (account.name, *account.orgs)

    def on_GET_whoami(self, request: Handler):
        account = self.account(request) if self.accounts else Account("owner")
        if account is None:
            return request.refuse(401, "")
        answer = {"type": "user", "name": account.name, "fullname": account.name}
        answer["orgs"] = [{"name": name} for name in account.orgs]
        answer["auth"] = {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}}
        return request.answer_json(200, answer)

    # Repositories

    def on_POST_create(self, request: Handler):
        wanted = json.loads(request.body)
        account = self.account(request)
        owner = wanted.get("organization") or (account.name if account else "owner")
        repo_id = f"{owner}/{wanted['name']}"
        kind = wanted.get("type") or "model"
        key = repo_id if kind == "model" else f"{kind}s/{repo_id}"
        if not self.may_write(request, key):
            return request.refuse(401 if self.accounts and account is None else 403, "")
        answer = {"url": f"{self.url}/{key}", "name": repo_id, "id": repo_id}
        with self.lock:
            if key in self.repositories:
                return request.answer_json(409, {"error": "You already created this repo", **answer})
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.repositories[key] = Repository(bool(private))
            self.repositories[key].commit({".gitattributes": b"*.bin filter=lfs\n"}, title="initial commit")
        return request.answer_json(200, answer)

    def on_POST_validate_yaml(self, request: Handler):
        content = json.loads(request.body)["content"]
        match = re.match(r"^\s*---\n(.*?)\n---", content, re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else {}
            errors = [] if isinstance(data, dict) else [{"message": "metadata must be a mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        return request.answer_json(400 if errors else 200, {"errors": errors, "warnings": []})

    def on_GET_models(self, request: Handler):
        """Search by `search` (in the name) and `filter` (tags of the card)."""
        query = parse_qs(urlsplit(request.path).query)
        found = []
        for repo, repository in self.repositories.items():
            if repo.startswith("datasets/") or (repository.private and not self.may_read(self.account(request), repo)):
                continue
            tags = card_tags(repository.files().get("README.md", b"").decode())
            if query.get("search", [""])[0].lower() in repo.lower() and set(query.get("filter", [])) <= set(tags):
                found.append(self.info(repo, repository.resolve("main")) | {"tags": tags})
        return request.answer_json(200, found)

    def info(self, repo: str, commit: str | None) -> dict:
        repository = self.repositories[repo]
        files = repository.snapshots.get(commit, {})
        return {
            "id": repo.removeprefix("datasets/"), "sha": commit, "private": repository.private,
            "gated": "auto" if repository.gated else False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }  # fmt: skip

    def on_GET_info(self, request: Handler, repo: str, revision: str | None):
        found = self._snapshot(request, repo, revision or "main")
        return found and request.answer_json(200, self.info(repo, found[0]))

    def on_GET_refs(self, request: Handler, repo: str):
        if self.refuse_reader(request, repo):
            return None
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in self.repositories[repo].branches.items()
        ]
        return request.answer_json(200, {"branches": branches, "tags": [], "converts": []})

    def on_POST_branch(self, request: Handler, repo: str, branch: str):
        if not self.may_write(request, repo):
            return request.refuse(403, "")
        repository = self.repositories[repo]
        if branch in repository.branches:
            return request.refuse(409, "")
        repository.branches[branch] = repository.branches["main"]
        return request.answer_json(200, {})

    def on_GET_commits(self, request: Handler, repo: str, revision: str):
        found = self._snapshot(request, repo, revision)
        history = self.repositories[repo].history.get(revision, []) if found else []
        entries = [
            {"id": commit, "title": title, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
            for commit, title in reversed(history)
        ]
        return found and request.answer_json(200, entries)

    # Tree

    def on_GET_tree(self, request: Handler, repo: str, revision: str, path: str | None):
        found = self._snapshot(request, repo, revision)
        if found is None:
            return None
        query = parse_qs(urlsplit(request.path).query)
        start = f"{path}/" if path else ""
        inside = {name: data for name, data in found[1].items() if name.startswith(start)}
        if path and not inside:
            return request.refuse(404, "EntryNotFound")
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        entries, folders = [], set()
        for name, data in sorted(inside.items()):
            parents = name[len(start) :].split("/")[:-1]
            for depth in range(len(parents) if recursive else min(1, len(parents))):
                folders.add(start + "/".join(parents[: depth + 1]))
            if recursive or not parents:
                entries.append(self.entry(name, data))
        entries = [
            {"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)
        ] + entries
        first = int(query.get("cursor", ["0"])[0])
        headers = {"Content-Type": "application/json"}
        if first + self.page_size < len(entries):
            address = f"{self.url}{urlsplit(request.path).path}?recursive={str(recursive).lower()}"
            headers["Link"] = f'<{address}&cursor={first + self.page_size}>; rel="next"'
        return request.answer(200, json.dumps(entries[first : first + self.page_size]).encode(), headers)

    def on_POST_paths_info(self, request: Handler, repo: str, revision: str):
        found = self._snapshot(request, repo, revision)
        if found is None:
            return None
        entries = []
        for path in parse_qs(request.body.decode()).get("paths", []):
            if path in found[1]:
                entries.append(self.entry(path, found[1][path]))
            elif any(name.startswith(f"{path}/") for name in found[1]):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        return request.answer_json(200, entries)

    def entry(self, path: str, data: bytes) -> dict:
        """A file as tree listings show it."""
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if is_lfs(path, data):
            sha256 = self.sha256(path, data)
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
            entry["oid"] = git_oid(sha256.encode())
            if sha256 in self.xet.files_by_sha256:
                entry["xetHash"] = self.xet.files_by_sha256[sha256]
        return entry

    # Xet

    def on_GET_xet_token(self, request: Handler, repo: str, use: str, revision: str):
        if use == "write" and not self.may_write(request, repo):
            return request.refuse(403, "")
        url, expires = f"{self.url}/xet", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        body = json.dumps({"casUrl": url, "accessToken": "xet", "exp": expires}).encode()
        return request.answer(200, body, headers | {"Content-Type": "application/json"})

    def on_GET_xet(self, request: Handler, rest: str):
        return self.xet.handle(request, rest)

    on_POST_xet = on_GET_xet

    def _snapshot(self, request: Handler, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if self.refuse_reader(request, repo):
            return None
        repository = self.repositories[repo]
        commit = repository.resolve(revision)
        return (commit, repository.snapshots[commit]) if commit else request.refuse(404, "RevisionNotFound")

    def _find(self, request: Handler, repo: str, revision: str, path: str) -> tuple[str, bytes] | None:
        found = self._snapshot(request, repo, revision)
        if found is None:
            return None
        commit, files = found
        return (commit, files[path]) if path in files else request.refuse(404, "EntryNotFound")


def main() -> None:
    """Serve an empty Hub until Ctrl-C."""
    parser = argparse.ArgumentParser(description="A Hub on loopback, kept in memory until Ctrl-C.")
    parser.add_argument("--port", type=int, default=8000, help="(8000)")
    parser.add_argument("--user", default="me", help="whose token is printed (me)")
    args = parser.parse_args()
    try:
        hub = HubServer(args.port)
    except (OSError, OverflowError) as error:
        raise SystemExit(f"error: port {args.port} can't be had ({error}); give another --port.") from error
    with hub:
        token = f"hf_{secrets.token_hex(17)}"
        hub.accounts = {token: Account(args.user)}
        print(f"A Hub for {args.user}, empty and forgotten at Ctrl-C. In another terminal:")
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={token} HF_HOME=$(mktemp -d)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
