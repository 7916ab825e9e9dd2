"""How files come into the test Hub, by LFS or with a commit that names them, and how they leave it."""

from __future__ import annotations

import base64
import hashlib
import json
import re

from hub_http import Handler
from hub_repository import LFS_SUFFIXES, git_oid, is_lfs


class Transfers:
    """The part of `HubServer` that takes files in and gives them out."""

    # Upload

    def on_POST_preupload(self, request: Handler, repo: str, revision: str):
        if not self.may_write(request, repo):
            return request.refuse(403, "")
        found = self._snapshot(request, repo, revision)
        if found is None:
            return None
        files = []
        for wanted in json.loads(request.body)["files"]:
            path, there = wanted["path"], found[1].get(wanted["path"])
            lfs = (path.endswith(LFS_SUFFIXES) or wanted["size"] > 10_000_000) and wanted["size"] > 0
            file = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if there is not None:
                file["oid"] = self.sha256(path, there) if lfs else git_oid(there)
            files.append(file)
        return request.answer_json(200, {"files": files})

    def on_POST_lfs_batch(self, request: Handler, repo: str):
        if not self.may_write(request, repo):
            return request.refuse(403, "")
        objects, transfer = [], "basic"
        for wanted in json.loads(request.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.objects:
                href, header = f"{self.url}/lfs/{oid}", {}
                if size > self.part_bytes:
                    transfer = "multipart"
                    count = -(-size // self.part_bytes)
                    header = {"chunk_size": str(self.part_bytes)}
                    header |= {f"{part:05}": f"{href}/{part}" for part in range(1, count + 1)}
                answer["actions"] = {"upload": {"href": href, "header": header}}
            objects.append(answer)
        return request.answer_json(200, {"transfer": transfer, "objects": objects})

    def on_PUT_lfs(self, request: Handler, sha256: str, part: str | None):
        if part is not None:
            self.parts.setdefault(sha256, {})[int(part)] = request.body
            return request.answer(200, b"", {"ETag": f'"{part}"'})
        return self._keep(request, sha256, request.body)

    def on_POST_lfs(self, request: Handler, sha256: str, part: str | None):
        parts = self.parts.pop(sha256)
        wanted = [entry["partNumber"] for entry in json.loads(request.body)["parts"]]
        return self._keep(request, sha256, b"".join(parts[number] for number in wanted))

    def _keep(self, request: Handler, sha256: str, data: bytes):
        if hashlib.sha256(data).hexdigest() != sha256:
            return request.refuse(400, "")
        self.objects[sha256] = data
        return request.answer(200, b"")

    def on_POST_commit(self, request: Handler, repo: str, revision: str):
        if not self.may_write(request, repo):
            return request.refuse(403, "")
        found = self._snapshot(request, repo, revision)
        if found is None:
            return None
        with self.lock:  # one commit at a time, whole or not at all
            repository = self.repositories[repo]
            head = repository.branches[revision]
            files, title = dict(repository.snapshots[head]), ""
            for line in request.body.decode().splitlines():
                key, value = (entry := json.loads(line))["key"], entry["value"]
                if key == "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, head):
                        return request.refuse(412, "")
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    content = self.objects.get(value["oid"]) or self.xet.content(value["oid"])
                    if content is None:
                        return request.refuse(400, "")
                    files[value["path"]] = content
                elif key == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        return request.refuse(404, "EntryNotFound")
                else:
                    start = value["path"].rstrip("/") + "/"
                    files = {path: data for path, data in files.items() if not path.startswith(start)}
            commit = repository.commit(files, revision, title=title)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{repo}/commit/{commit}"}
        return request.answer_json(200, answer | {"hookOutput": ""})

    # Download

    def on_HEAD_resolve(self, request: Handler, repo: str, revision: str, path: str):
        found = self._find(request, repo, revision, path)
        if found is None:
            return None
        commit, data = found
        if not is_lfs(path, data):
            headers = {"X-Repo-Commit": commit, "ETag": f'"{git_oid(data)}"', "Accept-Ranges": "bytes"}
            return request.answer(200, self.served.get(path, data), headers)
        # Another host name than the endpoint's, as on the Hub: the client must not follow it for a HEAD.
        sha256 = self.sha256(path, data)
        headers = {"X-Repo-Commit": commit, "Location": f"http://localhost:{self.port}/blob/{repo}/{commit}/{path}"}
        headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        if sha256 in self.xet.files_by_sha256:
            kind, name = ("datasets", repo[9:]) if repo.startswith("datasets/") else ("models", repo)
            route = f"{self.url}/api/{kind}/{name}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": self.xet.files_by_sha256[sha256], "Link": f'<{route}>; rel="xet-auth"'}
        return request.answer(302, b"", headers)

    on_GET_resolve = on_HEAD_resolve

    def on_GET_blob(self, request: Handler, repo: str, revision: str, path: str):
        data = self.served.get(path, self.repositories[repo].snapshots[revision][path])
        span = re.match(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if span:
            first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            return request.answer(206, data[first : last + 1], headers)
        return request.answer(200, data, {"Accept-Ranges": "bytes"})

    on_HEAD_blob = on_GET_blob
