"""A page in headless Chromium, driven over two pipes by the DevTools protocol: what a test presses, reads and photographs.

Nothing but the standard library and the browser itself: messages are JSON, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 120.0
"""Seconds to wait for anything."""


class Page:
    """One open page. `requests` are the addresses that it asked for, `complaints` errors and messages of its console."""

    def __init__(self, commands: int, answers: int) -> None:
        """Speak through file descriptors: `commands` is written, `answers` read."""
        self._commands, self._answers = commands, answers
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result; AssertionError where the browser refuses it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        waiting = json.dumps(message).encode() + b"\0"
        while waiting:
            waiting = waiting[os.write(self._commands, waiting) :]
        while True:
            told = self._next()
            if told.get("id") == self._number:
                assert "error" not in told, told["error"]
                return dict(told["result"])
            self._note(told)

    def open(self, path: Path, width: int = 1440, height: int = 900) -> float:
        """Open a file and wait until its script says that all is drawn; returns the seconds until its load event."""
        self.resize(width, height)
        still = [{"name": "prefers-reduced-motion", "value": "reduce"}]  # or a page scrolls away from under the mouse
        self.send("Emulation.setEmulatedMedia", media="", features=still)
        started = time.perf_counter()
        self.send("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")
        loaded = time.perf_counter() - started
        self.wait("document.documentElement.dataset.ready === 'yes'")
        return loaded

    def resize(self, width: int, height: int) -> None:
        """Give the window so many CSS pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; AssertionError where it throws."""
        told = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until an expression is true."""
        ends = time.monotonic() + PATIENCE
        while not self.run(script):
            assert time.monotonic() < ends, f"never true: {script}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """What an element shows."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """Press an element as a mouse does, in the middle of where it is."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{place}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({place}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def focus(self, selector: str) -> None:
        """Give an element the keyboard."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")

    def press(self, key: str, code: int, text: str = "") -> None:
        """One key, by its name and its code for Windows."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def write(self, selector: str, text: str) -> None:
        """Type over what an input holds."""
        self.focus(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text)

    def choose(self, selector: str, label: str) -> None:
        """Take an option of a select by its words."""
        place, words = json.dumps(selector), json.dumps(label)
        self.run(
            f"(select => {{ select.value = [...select.options].find(one => one.text === {words}).value;"
            f" select.dispatchEvent(new Event('change', {{bubbles: true}})); }})(document.querySelector({place}))"
        )

    def image(self, path: Path, whole: bool = True) -> None:
        """Photograph the page, all of its length or the window, as PNG."""
        told = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(told["data"]))

    def printed(self, path: Path) -> None:
        """The page as PDF."""
        path.write_bytes(base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"]))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], PATIENCE)
            assert ready, "the browser is silent"
            some = os.read(self._answers, 1 << 20)
            assert some, "the browser ended"
            self._buffer += some
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, told: dict[str, Any]) -> None:
        method, about = told.get("method"), told.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"{about['type']}: {about['args']}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(about["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.complaints.append(f"{about['entry']['level']}: {about['entry']['text']}")


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page in a Chromium of its own, whose profile lies in `profile` and whose downloads lie in `profile/downloads`."""
    assert CHROMIUM is not None, "there is no Chromium"
    to_browser, from_browser = os.pipe(), os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser[0], from_browser[1])]
    for end in (to_browser[0], from_browser[1]):
        os.close(end)

    def hand_over() -> None:
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    process = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=hand_over,
    )
    for end in ends:
        os.close(end)
    try:
        page = Page(to_browser[1], from_browser[0])
        page.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(profile / "downloads"))
        yield page
    finally:
        process.kill()
        process.wait()
        os.close(to_browser[1])
        os.close(from_browser[0])
