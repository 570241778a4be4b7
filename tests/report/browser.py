"""Headless Chromium, told what to do over its debugging pipe: messages of the DevTools protocol, each ended by NUL."""

from __future__ import annotations

import base64
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

    requests  addresses that it asked for
    errors    what it has thrown and not caught, and what the browser or the page wrote to the console as an error,
              refusals of its security policy included
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str):
        self._process, self._number, self._session = process, 0, None
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")
        self.open(url)

    def open(self, url: str) -> None:
        """Go to an address and wait until the page is there."""
        self._load("Page.navigate", url=url)

    def reload(self) -> None:
        """Load the page again and wait until it is there. Its process stays the same, unlike where an address is opened
        anew: another process may see what localStorage was given a moment later (seen on a busy machine)."""
        self._load("Page.reload")

    def _load(self, method: str, **parameters: object) -> None:
        self._ask(method, **parameters)
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def run(self, program: str) -> Any:
        """The value of a JavaScript expression, or what its promise becomes."""
        said = self._ask(
            "Runtime.evaluate", expression=program, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def key(self, key: str, *, code: int = 0, shift: bool = False) -> None:
        """Press a key and let it go, wherever the focus is. code: of Windows, for a key that is no character."""
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self._ask(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=8 * shift, **text
            )

    def downloads_to(self, folder: Path) -> None:
        """Where what the page saves goes, without a question."""
        self._ask("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def choose_file(self, element: str, file: Path) -> None:
        """Give a file to the input that a selector names, as its dialog would."""
        root = self._ask("DOM.getDocument")["root"]["nodeId"]
        node = self._ask("DOM.querySelector", nodeId=root, selector=element)["nodeId"]
        self._ask("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Give the window this size in CSS pixels, and the person this taste."""
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        """The whole page as PNG."""
        made = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(made["data"])

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
        told = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(told["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(told["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "assert"):
                self.errors.append(json.dumps(told["args"]))
            case "Log.entryAdded" if told["entry"]["level"] == "error":
                self.errors.append(told["entry"]["text"])
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
