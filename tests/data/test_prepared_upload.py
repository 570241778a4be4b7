"""A prepared folder goes to the hub and comes back, by a small local server in the hub's place."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from trainer.data import prepared
from trainer.data.prepared_upload import push
from trainer.errors import ConfigError, StorageError
from trainer.spec.shapes import FRAME_RATE_HZ


class Hub(ThreadingHTTPServer):
    """The part of the hub's protocol by which a data set is made and a commit of small files is sent.

    files   of the data set, by path
    asked   the bodies of the requests, by the last part of their path
    refuse  the status with which everything is answered; 0 for none
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.files: dict[str, bytes] = {}
        self.asked: dict[str, list[Any]] = {}
        self.refuse = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            for path, content in self.server.files.items()
        ]
        self.answer(entries if "/tree/" in self.path else {"id": "user/set", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        kind = re.sub(r"/main$", "", self.path).rpartition("/")[2]
        self.server.asked.setdefault(kind, []).extend(lines)
        if kind == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in lines[0]["files"]
            ]
            self.answer({"files": modes})
        elif kind == "commit" and not self.server.refuse:
            self.server.commit(lines)
            self.answer({"commitUrl": f"{self.server.address}/datasets/user/set/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({"url": f"{self.server.address}/datasets/user/set", "errors": [], "warnings": []})

    def answer(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(self.server.refuse or 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the console."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a prepared folder; what is in them is nothing to a hub."""
    files = {"clips.parquet": b"table", "codes/part-00000.arrow": b"codes", "text/part-00000.arrow": b"states"}
    for name, content in files.items():
        (tmp_path / "prepared" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "prepared" / name).write_bytes(content)
    about = prepared.About(
        codec="c", text_encoder="t", model_id="debug", codebooks=4, frame_rate_hz=FRAME_RATE_HZ, sample_rate_hz=32_000,
        clips=3, hours=0.1, flags={}, files={name: len(content) for name, content in files.items()},
        digests=dict.fromkeys(files, ""),
    )  # fmt: skip
    (tmp_path / "prepared/README.md").write_text("---\nconfigs: []\n---\n")
    (tmp_path / "prepared/prepared.json").write_text(about.to_json())
    return tmp_path / "prepared"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_pushed_whole_to_a_private_data_set_and_replaces_the_former_one(hub, folder):
    hub.files = {"codes/part-00001.arrow": b"of a former one", "notes.md": b"mine"}
    ours = contents(folder)
    (folder / "secret.txt").write_text("not of a prepared folder")
    push(prepared.open_prepared(folder), "user/set", private=True, endpoint=hub.address)
    assert hub.files == ours | {"notes.md": b"mine"}
    [made] = hub.asked["create"]
    assert made["type"] == "dataset" and (made.get("private") or made.get("visibility") == "private")
    assert sum(line["key"] == "header" for line in hub.asked["commit"]) == 1
    assert prepared.are_prepared(hub.files)


def test_what_the_hub_refuses_is_told_with_what_to_do(hub, folder):
    hub.refuse = 403
    with pytest.raises(StorageError, match=r"--push_to_hub user/set: .*403.* is complete: log in with `hf auth login`"):
        push(prepared.open_prepared(folder), "user/set", private=True, endpoint=hub.address)
    with pytest.raises(ConfigError, match="--push_to_hub a/b/c is no name of a data set"):
        push(prepared.open_prepared(folder), "a/b/c", private=True, endpoint=hub.address)


def test_a_hub_that_cannot_be_reached_is_told(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(StorageError, match="it could not be uploaded"):
        push(prepared.open_prepared(folder), "user/set", private=True, endpoint="http://127.0.0.1:9")
