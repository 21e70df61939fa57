"""A Hugging Face Hub for the real huggingface_hub and the real Xet: its HTTP API as of version 2.4, repositories and buckets.

Bytes of large files go through Xet, chunked and deduplicated as on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import hf_xet

from tests.storage.fake_http import Answer, Asked, FakeServer, Refused
from tests.storage.fake_xet import FakeXet

TOKEN = "hf_fake_token_that_may_write"
READER = "hf_fake_token_that_may_read"
PAGE = 100
REGULAR_BYTES = 4096  # larger files, and those that are no text, go to Xet


@dataclass(frozen=True)
class File:
    size: int
    content: bytes | None = None
    xet_hash: str | None = None
    sha256: str | None = None


@dataclass
class Repo:
    private: bool = False
    files: dict[str, File] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)  # (id, summary)

    def add_commit(self, summary: str) -> str:
        oid = hashlib.sha1(f"{id(self)} {len(self.commits)} {summary}".encode()).hexdigest()
        self.commits.append((oid, summary))
        return oid


def refuse(status: int, code: str = "", message: str = "", **headers: str) -> Refused:
    told = {**({"X-Error-Code": code} if code else {}), **({"X-Error-Message": message} if message else {}), **headers}
    return Refused(Answer(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **told}))


class FakeHub(FakeServer):
    """``env()`` leads the real client here."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="hf_spot-hub-"))
        self.repos: dict[str, Repo] = {}  # "models/owner/name"
        self.xet = FakeXet(self.endpoint)
        self._lock = threading.RLock()
        self._session = hf_xet.XetSession()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        shutil.rmtree(self.folder, ignore_errors=True)

    def env(self, token: str = TOKEN) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": token,
            "HF_HOME": str(self.folder / "home"),
            "HF_XET_CACHE": str(self.folder / "xet-cache"),
        }

    def make(self, name: str, *, private: bool = False) -> Repo:
        """A new, empty ``models/owner/name``, ``datasets/…`` or ``buckets/…``."""
        repo = self.repos[name] = Repo(private)
        repo.add_commit("initial commit")
        if not name.startswith("buckets/"):
            repo.files[".gitattributes"] = File(3, b"*.x")
        return repo

    # -- requests -----------------------------------------------------------------------------------------------------

    def decide(self, asked: Asked) -> Answer:
        parts = asked.path.strip("/").split("/")
        if parts[0] == "cas":
            return self.xet.decide(asked)
        if asked.path == "/api/repos/create":
            return self._create(asked)
        if asked.path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if parts[0] == "api":
            name, rest = "/".join(parts[1:4]), parts[4:]
            raw = asked.raw_path.strip("/").split("/")[4:]
        else:
            place = parts if parts[0] in ("datasets", "buckets") else ["models", *parts]
            name, rest, raw = "/".join(place[:3]), place[3:], []
        repo = self._repo(name, asked)
        is_bucket = name.startswith("buckets/")
        what = rest[0] if rest else ""
        if what == "resolve":
            return self._resolve(repo, name, "/".join(rest[1:] if is_bucket else rest[2:]))
        with self._lock:
            if what.startswith("xet-"):
                if "write" in what:
                    self._may_write(asked)
                return self._xet_token()
            if what == "paths-info":
                body = asked.body.decode()
                paths = json.loads(body)["paths"] if body.startswith("{") else _form(body, "paths")
                return _json([_told(path, repo.files[path]) for path in paths if path in repo.files])
            if what == "tree":
                folder = "/".join(unquote(part) for part in (raw[1:] if is_bucket else raw[2:]))
                return self._tree(repo, folder, asked)
            if is_bucket and what == "batch":
                self._may_write(asked)
                return self._batch(repo, asked)
            if what == "refs":
                branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commits[-1][0]}
                return _json({"branches": [branch], "tags": [], "converts": []})
            if what == "preupload":
                return self._preupload(repo, asked)
            if what == "commit":
                self._may_write(asked)
                return self._commit(repo, name, asked)
            if not rest or what == "revision":
                info = {"id": "/".join(parts[2:4]), "sha": repo.commits[-1][0], "private": repo.private, "tags": []}
                return _json({**info, "siblings": [{"rfilename": path} for path in sorted(repo.files)]})
        raise refuse(404, message=f"no such API: {asked.method} {asked.path}")

    def _repo(self, name: str, asked: Asked) -> Repo:
        token = asked.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READER):
            raise refuse(401, message="Invalid credentials in Authorization header")
        repo = self.repos.get(name)
        if repo is None or (repo.private and not token):
            raise refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        return repo

    def _may_write(self, asked: Asked) -> None:
        if asked.headers.get("authorization") != f"Bearer {TOKEN}":
            raise refuse(403, message="Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")

    def _create(self, asked: Asked) -> Answer:
        self._may_write(asked)
        wanted = json.loads(asked.body)
        name = f"{wanted.get('type', 'model')}s/{wanted.get('organization') or 'me'}/{wanted['name']}"
        with self._lock:
            if name in self.repos:
                raise refuse(409, message="You already created this model repo")
            self.make(name, private=bool(wanted.get("private") or wanted.get("visibility") == "private"))
        return _json({"url": f"{self.endpoint}/{name.removeprefix('models/')}", "id": name.partition("/")[2]})

    def _resolve(self, repo: Repo, name: str, path: str) -> Answer:
        file = repo.files.get(path)
        if file is None:
            raise refuse(404, "EntryNotFound", "Entry not found")
        body = file.content if file.content is not None else self.bytes_of(file)
        headers = {"ETag": f'"{file.sha256 or hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": repo.commits[-1][0]}
        if file.xet_hash:
            route = f"{self.endpoint}/api/{name}/xet-read-token" + ("" if name.startswith("buckets/") else "/main")
            headers |= {"X-Xet-Hash": file.xet_hash, "X-Xet-Refresh-Route": route, "X-Linked-Size": str(file.size)}
        return Answer(200, body, headers)

    def bytes_of(self, file: File) -> bytes:
        if not file.size:
            return b""
        until = int(time.time()) + 3600
        group = self._session.new_download_stream_group(endpoint=self.xet.endpoint, token="x", token_expiry_unix_secs=until)
        return b"".join(group.download_stream(hf_xet.XetFileInfo(file.xet_hash, file.size)))

    def _xet_token(self) -> Answer:
        until = int(time.time()) + 3600
        told = {"accessToken": "xet", "exp": until, "casUrl": self.xet.endpoint}
        headers = {"X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until), "X-Xet-Cas-Url": self.xet.endpoint}
        return Answer(200, json.dumps(told).encode(), {"Content-Type": "application/json", **headers})

    def _tree(self, repo: Repo, folder: str, asked: Asked) -> Answer:
        inside = sorted((path, file) for path, file in repo.files.items() if path.startswith(f"{folder}/" if folder else ""))
        if folder and not inside:
            raise refuse(404, "EntryNotFound", "Entry not found")
        first = int(asked.query.get("cursor", 0))
        headers = {"Content-Type": "application/json"}
        if len(inside) > first + PAGE:
            url = f"{self.endpoint}{asked.raw_path}?recursive=true&cursor={first + PAGE}"
            headers["Link"] = f'<{url}>; rel="next"'
        page = [_told(path, file) for path, file in inside[first : first + PAGE]]
        return Answer(200, json.dumps(page).encode(), headers)

    # -- writing ------------------------------------------------------------------------------------------------------

    def _preupload(self, repo: Repo, asked: Asked) -> Answer:
        files = []
        for told in json.loads(asked.body)["files"]:
            sample = base64.b64decode(told["sample"])
            text = b"\0" not in sample and told["size"] <= REGULAR_BYTES
            mode = "regular" if text else "lfs"
            files.append({"path": told["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        return _json({"files": files, "commitOid": repo.commits[-1][0]})

    def _commit(self, repo: Repo, name: str, asked: Asked) -> Answer:
        lines = [json.loads(line) for line in asked.body.splitlines()]
        head = lines[0]["value"]
        if (parent := head.get("parentCommit")) and not repo.commits[-1][0].startswith(parent):
            raise refuse(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.files)
        for line in lines[1:]:
            path, value = line["value"]["path"], line["value"]
            if line["key"] == "deletedFile":
                if path not in files:
                    raise refuse(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
                del files[path]
            elif line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[path] = File(len(content), content)
            elif line["key"] == "lfsFile":
                files[path] = self._uploaded(value["oid"])
            else:
                raise refuse(400, message=f"unknown operation {line['key']}")
            if any(path.startswith(f"{other}/") for other in files if other != path and len(other) < len(path)):
                raise refuse(400, message=f"{path}: a file can't be a folder")
        repo.files = files
        oid = repo.add_commit(head["summary"])
        url = f"{self.endpoint}/{name.removeprefix('models/')}"
        return _json({"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", "hookOutput": ""})

    def _uploaded(self, sha256: str) -> File:
        """What Xet keeps under this SHA-256, which it was told with the file."""
        found = self.xet.by_sha256(sha256)
        if found is None:
            raise refuse(400, message=f"LFS pointer pointed to a file that does not exist: {sha256}")
        return File(found[1].size, None, found[0], sha256)

    def _batch(self, repo: Repo, asked: Asked) -> Answer:
        failed = []
        operations = [json.loads(line) for line in asked.body.splitlines()]
        for told in operations:
            path = told["path"]
            if told["type"] == "deleteFile":
                if repo.files.pop(path, None) is None:
                    failed.append({"path": path, "error": "no such file"})
            elif (kept := self.xet.files.get(told["xetHash"])) is None:
                failed.append({"path": path, "error": "no such Xet hash"})
            else:
                repo.files[path] = File(kept.size, None, told["xetHash"])
        succeeded = len(operations) - len(failed)
        told = {"success": not failed, "processed": len(operations), "succeeded": succeeded, "failed": failed}
        return Answer(422 if failed and not succeeded else 200, json.dumps(told).encode(), {"Content-Type": "application/json"})


def _told(path: str, file: File) -> dict[str, Any]:
    content = file.content if file.content is not None else (file.xet_hash or "").encode()
    told: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": hashlib.sha1(content).hexdigest()}
    if file.xet_hash:
        told["xetHash"] = file.xet_hash
    if file.sha256:
        told["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    return told


def _json(value: Any) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _form(body: str, name: str) -> list[str]:
    pairs = (pair.partition("=") for pair in body.split("&"))
    return [unquote(value.replace("+", " ")) for key, _, value in pairs if key == name]
