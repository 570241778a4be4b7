"""Headless Chromium, told what to do over its debugging pipe: messages of the DevTools protocol, each ended by NUL."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """One page that is open.

    requests  the addresses that it asked for
    console   what its console was told, errors of the page and refusals of its security policy included
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str):
        self._process, self._number, self._session = process, 0, None
        self.requests: list[str] = []
        self.console: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._ask("Network.enable")
        self._ask("Page.enable")
        self._ask("Runtime.enable")
        self._ask("Log.enable")
        self._ask("Page.navigate", url=url)
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def run(self, program: str) -> Any:
        """The value of a JavaScript expression, or what its promise becomes."""
        said = self._ask(
            "Runtime.evaluate", expression=program, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key as if it were pressed and let go. code: its Windows virtual-key code."""
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def _ask(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        message: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while (answer := self._read()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        text = bytearray()
        while (byte := self._process.stdout.read(1)) != b"\0":
            assert byte, "the browser ended"
            text += byte
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.console.append(json.dumps(message["params"]))
        return message


@contextmanager
def open_page(page: Path, profile: Path) -> Iterator[Tab]:
    """The page at its file:// address in a browser that is gone afterwards."""
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --mute-audio --remote-debugging-pipe"
    # The browser reads commands from descriptor 3 and answers on descriptor 4.
    command = f'exec "$0" {flags} --user-data-dir="$1" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
    with subprocess.Popen(
        ["sh", "-c", command, str(CHROMIUM), str(profile)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield Tab(process, page.resolve().as_uri())
        finally:
            process.kill()
