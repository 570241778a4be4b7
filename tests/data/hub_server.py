"""A server of the part of the Hugging Face hub's protocol that fetching a data set uses, from folders."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as constants
import pytest
from huggingface_hub import file_download


@dataclass
class Hub:
    """What the server has and was asked for.

    repos    folders by id, and by commit: {"user/name": {COMMIT: folder}}
    refs     the commit of each branch of a repository
    refused  status and X-Error-Code of repositories that are not handed out
    asked    method and path of each request
    """

    repos: dict[str, dict[str, Path]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def add(self, repo: str, folder: Path, commit: str, branch: str = "main") -> None:
        """Let `branch` of the repository be this folder."""
        self.repos.setdefault(repo, {})[commit] = folder
        self.refs.setdefault(repo, {})[branch] = commit


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def asked_by_this_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and a cache of its own, as HF_ENDPOINT and HF_HUB_CACHE set them when the library is loaded."""
    with serving() as hub:
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        info = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|paths-info)/(.+))?", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = info or file
        if found is None:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        repo = found[1]
        if repo in self.hub.refused:
            status, code = self.hub.refused[repo]
            return self._send(status, b'{"error": "no"}', {"X-Error-Code": code} if code else {})
        if repo not in self.hub.repos:
            return self._send(401, b'{"error": "Invalid username or password."}', {"X-Error-Code": "RepoNotFound"})
        revision = (found[3] if info else found[2]) or "main"
        commit = self.hub.refs[repo].get(revision, revision)
        folder = self.hub.repos[repo].get(commit)
        if folder is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return self._info(repo, commit, folder) if info else self._file(folder / found[3], commit)

    def _info(self, repo: str, commit: str, folder: Path) -> None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = [{"rfilename": path.relative_to(folder).as_posix(), "size": path.stat().st_size} for path in paths]
        if "paths-info" in self.path:
            rows = [{"type": "file", "path": file["rfilename"], "size": file["size"], "oid": "0"} for file in files]
            return self._send(200, json.dumps(rows).encode(), {})
        self._send(200, json.dumps({"id": repo, "sha": commit, "siblings": files}).encode(), {})

    def _file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = path.read_bytes()
        tag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            status, content = 206, content[start : end + 1]
        self._send(status, content, headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
