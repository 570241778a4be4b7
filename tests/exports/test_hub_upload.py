"""Files go to a model repository once, whole or not at all: by a small local server in the hub's place."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest
from huggingface_hub import HfApi

from tests.hub_models_server import SIGNATURE, TOKEN, Models, Repository, environment, serving, used_by_this_process
from tests.runs import import_path
from trainer.errors import ConfigError, StorageError
from trainer.exports import hub_upload
from trainer.exports.hub_upload import check, upload
from trainer.model.hub_client import limit_silence


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Models]:
    with used_by_this_process(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path | bytes]:
    """Four files above 1 MiB, two small ones of LFS, and two of git."""
    draw = random.Random(0)
    made: dict[str, Path | bytes] = {"README.md": b"---\ntags: []\n---\n", "config.json": b"{}"}
    for number in range(4):
        path = tmp_path / f"model-{number}.safetensors"
        path.write_bytes(draw.randbytes((1 << 20) + number))
        made[path.name] = path
    return made | {f"samples/0{number}_a_after.mp3": draw.randbytes(900) for number in range(2)}


def contents(files: dict[str, Path | bytes]) -> dict[str, bytes]:
    return {name: file.read_bytes() if isinstance(file, Path) else file for name, file in files.items()}


def push(files: dict[str, Path | bytes], *, public: bool = False) -> hub_upload.Pushed:
    return upload(
        "ann/x", files, is_ours=lambda path: path.endswith((".mp3", ".safetensors")), public=public, message="step 3"
    )


def test_a_push_is_one_commit_and_a_second_one_of_the_same_files_is_none(hub: Models, files) -> None:
    first = push(files)
    assert hub.content("ann/x") == contents(files) and len(hub.repositories["ann/x"].commits) == 2
    assert (first.changed, first.private, first.url) == (True, True, f"{hub.url}/ann/x")
    assert not push(files).changed
    assert len(hub.repositories["ann/x"].commits) == 2
    assert Counter(hub.received) == Counter(set(hub.received)) and len(hub.received) == 6


def test_former_files_of_ours_go_and_those_of_others_stay(hub: Models, files) -> None:
    push(files | {"samples/09_old_after.mp3": b"old", "mine.txt": b"mine"})
    fewer = {name: file for name, file in files.items() if name != "model-0.safetensors"}
    assert push(fewer).changed
    assert hub.content("ann/x") == contents(fewer) | {"mine.txt": b"mine"}
    assert len(hub.repositories["ann/x"].commits) == 3


@pytest.mark.parametrize("whole", [0, 3, 5])
def test_a_push_that_is_killed_halfway_and_run_again_sends_each_file_once(tmp_path: Path, files, whole: int) -> None:
    """kill -9 while the file after the first `whole` ones is on its way."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom trainer.exports.hub_upload import upload\n"
        "files = {name: Path(path) for name, path in zip(sys.argv[1::2], sys.argv[2::2])}\n"
        "upload('ann/x', files, is_ours=lambda path: False, public=False, message='step 3')\n"
    )
    arguments = []
    for name, content in contents(files).items():
        path = tmp_path / "sent" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        arguments += [name, str(path)]
    with serving() as hub:
        variables = {**os.environ, **environment(hub, tmp_path), "PYTHONPATH": import_path()}
        command = [sys.executable, "-c", code, *arguments]
        hub.hold_after = whole
        with subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL) as process:
            assert hub.held.wait(60), "no further file came"
            process.kill()
        before = set(hub.received)
        assert len(before) == whole and len(hub.repositories["ann/x"].commits) == 1, "nobody sees a part of it"
        hub.hold_after = None
        subprocess.run(command, env=variables, check=True, timeout=60, capture_output=True)
        hub.release.set()
        assert hub.content("ann/x") == contents(files) and len(hub.repositories["ann/x"].commits) == 2
        of_lfs = [one for name, one in contents(files).items() if name.endswith((".mp3", ".safetensors"))]
        digests = {hashlib.sha256(one).hexdigest() for one in of_lfs}
        assert Counter(hub.received) == Counter(digests), "each once, those from before the kill too"


def test_what_can_be_known_before_is_refused_before_and_nothing_is_made(hub: Models, tmp_path: Path) -> None:
    check("ann/x", public=False)
    check("band/x", public=False)
    for name in ("x", "a/b/c", "ann/../x", "ann/x y"):
        with pytest.raises(ConfigError, match="is no name of a repository of the hub: it takes user/name"):
            check(name, public=False)
    with pytest.raises(ConfigError, match=r"the token is of ann, who cannot write for choir. It can for ann, band"):
        check("choir/x", public=False)
    hub.role = "read"
    with pytest.raises(ConfigError, match="the token of ann may only read: log in with `hf auth login`"):
        check("ann/x", public=False)
    assert hub.repositories == {}


def test_without_a_token_or_a_network_it_is_refused_before(
    hub: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        with pytest.raises(ConfigError, match="there is no token for the hub: log in"):
            check("ann/x", public=False)
        (tmp_path / "token").write_text("hf_another")
        with pytest.raises(StorageError, match=r"does not accept it.*Invalid user token") as refused:
            check("ann/x", public=False)
        assert "hf_another" not in str(refused.value)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match="HF_HUB_OFFLINE=1 forbids it"):
            check("ann/x", public=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="the hub's repository ann/x: the hub does not accept it"):
        check("ann/x", public=False)


def test_a_repository_that_may_not_be_written_or_is_public_unasked_is_refused(hub: Models, files) -> None:
    hub.repositories["ann/x"] = Repository(private=True)
    check("ann/x", public=False)
    hub.refuse = {"/auth-check/write": 403}
    with pytest.raises(ConfigError, match=r"the token may not write there \(.*403"):
        check("ann/x", public=False)
    hub.refuse = {}
    hub.repositories["ann/x"].private = False
    for refused in (lambda: check("ann/x", public=False), lambda: push(files)):
        with pytest.raises(ConfigError, match=r"is public, and what is uploaded there is as well. Say --public"):
            refused()
    check("ann/x", public=True)
    assert push(files, public=True).private is False
    assert hub.content("ann/x") == contents(files)


def test_a_new_repository_is_public_where_that_is_asked_for(hub: Models) -> None:
    assert push({"README.md": b"x"}, public=True).private is False
    assert hub.repositories["ann/x"].private is False


REFUSED = [("/commit/", 403), ("/repos/create", 403), ("/batch", 403), ("/blobs/", 403)]


@pytest.mark.parametrize(("part", "status"), REFUSED)
def test_an_upload_that_is_refused_says_why_and_tells_no_token_and_no_signature(
    hub: Models, files, part: str, status: int
) -> None:
    hub.refuse = {part: status}
    with pytest.raises(StorageError, match=f"ann/x: it could not be uploaded .*{status}") as refused:
        push(files)
    assert TOKEN not in str(refused.value) and SIGNATURE not in str(refused.value)
    assert all(len(one.commits) == 1 for one in hub.repositories.values())


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_upload, "limit_silence", lambda: limit_silence(0.3))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StorageError, match=r"ann/x: the hub does not accept it .*timed out"):
            check("ann/x", public=False)
    limit_silence()  # for the tests to come


@pytest.mark.full
@pytest.mark.parametrize("whole", [0, 5])
def test_ctrl_c_ends_an_upload_whose_connection_has_stalled(tmp_path: Path, files, whole: int) -> None:
    """Small files too, which the library would send in threads: those are waited for before a process ends."""
    code = (
        "from trainer.exports.hub_upload import upload\n"
        "files = {f'{n}.mp3': bytes([n]) * 900 for n in range(9)}\n"
        "upload('ann/x', files, is_ours=lambda path: False, public=False, message='step 3')\n"
    )
    with serving() as hub:
        variables = {**os.environ, **environment(hub, tmp_path), "PYTHONPATH": import_path()}
        hub.hold_after = whole
        with subprocess.Popen([sys.executable, "-c", code], env=variables, stderr=subprocess.DEVNULL) as process:
            assert hub.held.wait(60), "no file came"
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            finally:
                process.kill()
        assert len(hub.received) == whole and len(hub.repositories["ann/x"].commits) == 1


def test_who_changes_the_repository_meanwhile_is_not_overwritten(
    hub: Models, files, monkeypatch: pytest.MonkeyPatch
) -> None:
    push({"README.md": b"first"})
    repository, create = hub.repositories["ann/x"], HfApi.create_commit

    def late(self: HfApi, *given: Any, **named: Any) -> Any:
        repository.commits.append({"README.md": b"edited on the site"})
        return create(self, *given, **named)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(StorageError, match="412"):
        push(files)
    assert repository.files == {"README.md": b"edited on the site"}
