"""A Hub on loopback for tests: enough of the Hub's HTTP interface for its genuine client to download files.

    with HubServer() as hub:
        hub.put("owner/name", "folder/file.bin", b"...")
        hf_hub_download("owner/name", "folder/file.bin", endpoint=hub.url, cache_dir=tmp_path)

Large files are served as the Hub serves LFS files: a redirect to another host, the sha256 as linked ETag. Routes are
methods named `on_<METHOD>_<what>`; a subclass adds more to `routes`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".wav", ".flac", ".mp3", ".zip")


class Repository:
    """Files of one repository; each revision (40 hex digits) is a full snapshot, `branches` point at revisions."""

    def __init__(self):
        self.snapshots: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}

    def commit(self, files: dict[str, bytes], branch: str = "main", revision: str | None = None) -> str:
        digest = hashlib.sha1(repr([(path, len(data)) for path, data in sorted(files.items())]).encode())
        digest.update(str(len(self.snapshots)).encode())
        revision = revision or digest.hexdigest()
        self.snapshots[revision] = files
        self.branches[branch] = revision
        return revision

    def resolve(self, revision: str) -> str | None:
        revision = self.branches.get(revision, revision)
        return revision if revision in self.snapshots else None


class HubServer:
    """The server; `url` is its endpoint. `requests` lists (method, path) of every request it got."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken: dict[str, int] = {}
        """Repository id -> status with which every request for it is answered."""
        self.recorded_sha256: dict[str, str] = {}
        """File path -> sha256 the Hub claims for it instead of the true one."""
        self.routes = [
            (re.compile(r"^/blob/(?P<repo>[^/]+/[^/]+)/(?P<revision>[0-9a-f]{40})/(?P<path>.+)$"), "blob"),
            (re.compile(r"^/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$"), "resolve"),
            (re.compile(r"^/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)$"), "paths_info"),
        ]
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
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

    def sha256(self, path: str, data: bytes) -> str:
        return self.recorded_sha256.get(path, hashlib.sha256(data).hexdigest())

    def on_HEAD_resolve(self, request: _Handler, repo: str, revision: str, path: str):
        found = self._find(request, repo, revision, path)
        if found is None:
            return None
        commit, data = found
        if not is_lfs(path, data):
            headers = {"X-Repo-Commit": commit, "ETag": f'"{git_oid(data)}"', "Accept-Ranges": "bytes"}
            return request.answer(200, data, headers)
        # Another host name than the endpoint's, as on the Hub: the client must not follow it for a HEAD.
        location = f"http://localhost:{self.port}/blob/{repo}/{commit}/{path}"
        linked = {"X-Linked-ETag": f'"{self.sha256(path, data)}"', "X-Linked-Size": str(len(data))}
        return request.answer(302, b"", {"X-Repo-Commit": commit, "Location": location, **linked})

    on_GET_resolve = on_HEAD_resolve

    def on_GET_blob(self, request: _Handler, repo: str, revision: str, path: str):
        data = self.repositories[repo].snapshots[revision][path]
        start = re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if start:
            offset = int(start.group(1))
            span = f"bytes {offset}-{len(data) - 1}/{len(data)}"
            return request.answer(206, data[offset:], {"Content-Range": span})
        return request.answer(200, data, {"Accept-Ranges": "bytes"})

    on_HEAD_blob = on_GET_blob

    def on_POST_paths_info(self, request: _Handler, repo: str, revision: str):
        found = self._snapshot(request, repo, revision)
        if found is None:
            return None
        wanted = parse_qs(request.body.decode()).get("paths", [])
        entries = [self.entry(path, found[1][path]) for path in wanted if path in found[1]]
        return request.answer_json(200, entries)

    def entry(self, path: str, data: bytes) -> dict:
        """A file as tree listings show it."""
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if is_lfs(path, data):
            entry["lfs"] = {"oid": self.sha256(path, data), "size": len(data), "pointerSize": 130}
        return entry

    def _snapshot(self, request: _Handler, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.repositories.get(repo)
        if repository is None:
            return request.refuse(404, "RepoNotFound")
        commit = repository.resolve(revision)
        return (commit, repository.snapshots[commit]) if commit else request.refuse(404, "RevisionNotFound")

    def _find(self, request: _Handler, repo: str, revision: str, path: str) -> tuple[str, bytes] | None:
        found = self._snapshot(request, repo, revision)
        if found is None:
            return None
        commit, files = found
        return (commit, files[path]) if path in files else request.refuse(404, "EntryNotFound")


def is_lfs(path: str, data: bytes) -> bool:
    """Whether the Hub would keep this file in its large-file storage."""
    return path.endswith(LFS_SUFFIXES) or len(data) > 10_000_000


def git_oid(data: bytes) -> str:
    """The id git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def _dispatch(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        for pattern, name in self.hub.routes:
            match = pattern.match(path)
            method = getattr(self.hub, f"on_{self.command}_{name}", None)
            if match and method:
                groups = match.groupdict()
                if groups.get("repo") in self.hub.broken:
                    return self.refuse(self.hub.broken[groups["repo"]], "")
                return method(self, **groups)
        return self.answer_json(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, status: int, value):
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str):
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code} if code else {})

    def log_message(self, *_):
        pass
