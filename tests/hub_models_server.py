"""A server of the part of the Hugging Face hub's protocol by which a model is made, uploaded with LFS, and loaded.

Real HTTP, to which huggingface_hub talks as it is, with HF_HUB_DISABLE_XET=1: the hub's other storage, xet, has a
protocol of its own that is not here. What is answered follows huggingface_hub 2.4 and git-lfs's docs/api/batch.md.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as constants
import pytest
from huggingface_hub import file_download

TOKEN = "hf_SecretOfTheTest"
SIGNATURE = "SignatureOfTheTest"  # in the address to which a file is sent
OF_LFS = (".safetensors", ".mp3", ".bin", ".model")


@dataclass
class Repository:
    """A model repository. commits: from the first on, each all files by path; an LFS file is the digest of its blob."""

    private: bool
    commits: list[dict[str, bytes | str]] = field(default_factory=lambda: [{".gitattributes": b"*.mp3 filter=lfs\n"}])

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()

    @property
    def files(self) -> dict[str, bytes | str]:
        return self.commits[-1]


@dataclass
class Models:
    """What the server has, was asked for, and is to answer.

    blobs      content of LFS files by digest, shared by all repositories as on the hub
    received   digests of the blobs that came whole, in this order
    hold_after how many blobs may come: with the next one `held` is set, and it is never taken. None for all
    refuse     status by a part of the path that is answered with it
    role, name of the token and of its owner
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    received: list[str] = field(default_factory=list)
    hold_after: int | None = None
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    refuse: dict[str, int] = field(default_factory=dict)
    role: str = "write"
    name: str = "ann"
    asked: list[tuple[str, str]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def content(self, repository: str) -> dict[str, bytes]:
        """All files of the newest commit as they are downloaded, but .gitattributes."""
        files = self.repositories[repository].files
        whole = {path: self.blobs[one] if isinstance(one, str) else one for path, one in files.items()}
        return {path: one for path, one in whole.items() if path != ".gitattributes"}


@contextmanager
def serving() -> Iterator[Models]:
    """A hub on a free port of this machine."""
    hub = Models()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def used_by_this_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Models]:
    """A hub that this process talks to, with a token and a cache of its own."""
    with serving() as hub:
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def environment(hub: Models, folder: Path) -> dict[str, str]:
    """Variables by which another process talks to it."""
    return {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "hf_home"),
    }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    hub: Models
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client's acknowledgement

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_PUT(self) -> None:
        hub, digest = self.hub, urlsplit(self.path).path.rpartition("/")[2]
        if (status := hub.refuse.get("/blobs/")) is not None:
            self.rfile.read(int(self.headers["Content-Length"]))
            return self._send(status, {"error": "no"})
        with hub.lock:
            waits = hub.hold_after is not None and len(hub.received) >= hub.hold_after
        if waits:
            hub.held.set()
            hub.release.wait()
            self.close_connection = True  # its sender is gone by now
            return
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b"".join(iter(self._chunk, b""))
        else:
            content = self.rfile.read(int(self.headers["Content-Length"]))
        if hashlib.sha256(content).hexdigest() != digest:  # the sender was killed, or sends something else
            return self._send(400, {"error": "another digest"})
        with hub.lock:
            hub.received.append(digest)
            hub.blobs[digest] = content
        self._send(200, {})

    def _chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline() or b"0", 16))
        self.rfile.readline()
        return content

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        for part, status in self.hub.refuse.items():
            if part in path:
                return self._send(status, {"error": "You have no rights here"})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        may = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/whoami-v2":
            return self._whoami() if may else self._send(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(\.git/info/lfs/objects/\w+|/.*)?", path)
        repository = self.hub.repositories.get(found[1]) if found else None
        if found is None or repository is None or (repository.private and not may):
            return self._send(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        self._of_repository(found[1], repository, found[2] or "", body)

    def _whoami(self) -> None:
        access = {"displayName": "test", "role": self.hub.role}
        orgs = [{"name": "band", "roleInOrg": "write"}, {"name": "choir", "roleInOrg": "read"}]
        self._send(200, {"type": "user", "name": self.hub.name, "orgs": orgs, "auth": {"accessToken": access}})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or self.hub.name}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repositories:
            return self._send(409, url)
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=private)
        self._send(200, url)

    def _of_repository(self, name: str, repository: Repository, action: str, body: bytes) -> None:
        if action in ("", "/revision/main"):
            siblings = [{"rfilename": path} for path in repository.files]
            about = {"id": name, "sha": repository.sha, "private": repository.private, "siblings": siblings}
            self._send(200, about)
        elif action in ("/auth-check", "/auth-check/write"):
            self._send(200, {})
        elif action == "/preupload/main":
            self._send(200, {"files": [self._mode(repository, one) for one in json.loads(body)["files"]]})
        elif action.endswith("/batch"):
            actions = [self._action(one) for one in json.loads(body)["objects"]]
            self._send(200, {"transfer": "basic", "objects": actions})
        elif action.endswith("/verify"):
            self._send(200 if json.loads(body)["oid"] in self.hub.blobs else 404, {})
        elif action == "/commit/main":
            self._commit(name, repository, [json.loads(line) for line in body.splitlines() if line.strip()])
        elif action.startswith("/tree/"):
            self._send(200, self._entries(repository, list(repository.files)))
        elif action.startswith("/paths-info/"):
            self._send(200, self._entries(repository, json.loads(body)["paths"]))
        elif found := re.fullmatch(r"/resolve/[^/]+/(.+)", action):
            self._file(name, repository, found[1])
        else:
            self._send(404, {"error": "unknown"}, {"X-Error-Code": "EntryNotFound"})

    def _mode(self, repository: Repository, asked: dict[str, Any]) -> dict[str, Any]:
        there = repository.files.get(asked["path"])
        oid = there if there is None or isinstance(there, str) else _git_hash(there)
        mode = "lfs" if asked["path"].endswith(OF_LFS) or asked["size"] > 10_000_000 else "regular"
        return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _action(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What to do for a blob: nothing where it is there."""
        if asked["oid"] in self.hub.blobs:
            return asked
        where = urlsplit(self.path).path.removesuffix("/batch").lstrip("/")
        upload = {"href": f"{self.hub.url}/blobs/{asked['oid']}?X-Amz-Signature={SIGNATURE}"}
        return {**asked, "actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/{where}/verify"}}}

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        files, changes = dict(repository.files), [(line["key"], line["value"]) for line in lines]
        parents = [value.get("parentCommit") for key, value in changes if key == "header"]
        if parents[0] not in (None, repository.sha):
            return self._send(412, {"error": "A commit has happened since"})
        for key, value in changes:
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self._send(400, {"error": f"LFS pointer to {value['oid']}, which was not uploaded"})
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                del files[value["path"]]
        repository.commits.append(files)
        self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{repository.sha}", "commitOid": repository.sha})

    def _entries(self, repository: Repository, paths: list[str]) -> list[dict[str, Any]]:
        rows = []
        for path in paths:
            if (one := repository.files.get(path)) is not None:
                size = len(self.hub.blobs[one] if isinstance(one, str) else one)
                rows.append({"type": "file", "path": path, "size": size, "oid": "0" * 40})
        return rows

    def _file(self, name: str, repository: Repository, path: str) -> None:
        if path not in repository.files:
            return self._send(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.sha})
        one = repository.files[path]
        content = self.hub.blobs[one] if isinstance(one, str) else one
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": repository.sha}
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) is not None:
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._send(206, content[start : end + 1], headers)
        self._send(200, content, headers)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
