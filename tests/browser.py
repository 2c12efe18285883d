"""A page in headless Chromium, controlled over two pipes by the DevTools protocol.

It needs only the standard library and the browser. Messages are JSON, each ended by a zero byte.
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
TIMEOUT = 120.0
"""Seconds to wait for any answer or condition."""


class Page:
    """One open page. `requests` are the addresses that it requested, `console_messages` errors and messages in its console."""

    def __init__(self, commands: int, answers: int) -> None:
        """Connect through file descriptors: `commands` is written, `answers` is read."""
        self._commands, self._answers = commands, answers
        self._buffer = b""
        self._message_id = 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.console_messages: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; AssertionError if the browser refuses it."""
        self._message_id += 1
        message = {"id": self._message_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        unsent = json.dumps(message).encode() + b"\0"
        while unsent:
            unsent = unsent[os.write(self._commands, unsent) :]
        while True:
            received = self._next_message()
            if received.get("id") == self._message_id:
                assert "error" not in received, received["error"]
                return dict(received["result"])
            self._record_event(received)

    def open(self, path: Path, width: int = 1440, height: int = 900) -> float:
        """Open a file and wait until all its charts are rendered; return the seconds until its load event."""
        self.resize(width, height)
        # smooth scrolling would move elements during a click
        features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
        self.send("Emulation.setEmulatedMedia", media="", features=features)
        started = time.perf_counter()
        self.send("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")
        loaded = time.perf_counter() - started
        self.wait("document.documentElement.dataset.ready === 'yes'")
        return loaded

    def resize(self, width: int, height: int) -> None:
        """Set the size of the window in CSS pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; AssertionError if it throws."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + TIMEOUT
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """Return the visible text of an element."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """Click the centre of an element with the mouse."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({element}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def focus(self, selector: str) -> None:
        """Give an element the keyboard focus."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key, given by its name and its Windows key code."""
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **extra)

    def write(self, selector: str, text: str) -> None:
        """Replace the content of an input by typing."""
        self.focus(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text)

    def choose(self, selector: str, label: str) -> None:
        """Select an option by its label."""
        selector_json, label_json = json.dumps(selector), json.dumps(label)
        self.run(
            f"(select => {{ select.value = [...select.options].find(option => option.text === {label_json}).value;"
            f" select.dispatchEvent(new Event('change', {{bubbles: true}})); }})(document.querySelector({selector_json}))"
        )

    def screenshot(self, path: Path, full_page: bool = True) -> None:
        """Save a screenshot of the full page or of the window as PNG."""
        result = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=full_page, **self._clip(full_page))
        path.write_bytes(base64.b64decode(result["data"]))

    def print_pdf(self, path: Path) -> None:
        """Print the page to a PDF file."""
        path.write_bytes(base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"]))

    def _clip(self, full_page: bool) -> dict[str, Any]:
        if not full_page:
            return {}
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def _next_message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], TIMEOUT)
            assert ready, "the browser does not answer"
            received = os.read(self._answers, 1 << 20)
            assert received, "the browser ended"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _record_event(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.console_messages.append(f"{parameters['type']}: {parameters['args']}")
        elif method == "Runtime.exceptionThrown":
            self.console_messages.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.console_messages.append(f"{parameters['entry']['level']}: {parameters['entry']['text']}")


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Start a Chromium with the profile folder `profile` and yield its page; downloads go to `profile/downloads`."""
    assert CHROMIUM is not None, "Chromium is not installed"
    to_browser, from_browser = os.pipe(), os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser[0], from_browser[1])]
    for end in (to_browser[0], from_browser[1]):
        os.close(end)

    def set_up_pipes() -> None:
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    process = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=set_up_pipes,
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
