"""A headless Chromium, driven by its DevTools protocol over two pipes: nothing is installed for it.

Which one, and what happens where there is none, stands in `tests/conftest.py`.
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_SECONDS = 60.0


class Browser:
    """A running browser; messages go to file descriptor 3, answers come from 4."""

    def __init__(self, path: str, profile: Path) -> None:
        read_in, self._out = os.pipe()
        self._in, write_out = os.pipe()
        flags = (
            "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu",
            "--hide-scrollbars", "--no-first-run", "--disable-background-networking",
            "--disable-dev-shm-usage", "--force-color-profile=srgb", f"--user-data-dir={profile}",
        )  # fmt: skip
        # A shell gives the pipes their numbers.
        line = f'exec "$@" 3<&{read_in} 4>&{write_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", path, *flags, "about:blank"],
            pass_fds=(read_in, write_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_in)
        os.close(write_out)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; what happens meanwhile is added to `events`."""
        self._number += 1
        request: dict[str, Any] = {
            "id": self._number, "method": method, "params": parameters,
        }  # fmt: skip
        if session is not None:
            request["sessionId"] = session
        os.write(self._out, json.dumps(request).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                answer: dict[str, Any] = message["result"]
                return answer
            self.events.append(message)

    def wait_for(self, method: str, session: str) -> None:
        """Return once the event came."""
        while not any(
            event.get("method") == method and event.get("sessionId") == session
            for event in self.events
        ):
            self.events.append(self._message())

    def _message(self) -> dict[str, Any]:
        ends = time.monotonic() + _SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, ends - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self._in, 2**20)
            assert piece, f"the browser ended with {self._process.poll()}"
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def close(self) -> None:
        """End it."""
        os.close(self._out)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)


class Tab:
    """One page; every complaint of it and every request that it makes is kept."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session: str = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """See `Browser.call`."""
        return self._browser.call(method, self._session, **parameters)

    def open(self, path: Path) -> None:
        """Open a file and wait until it and its pictures are there."""
        self._browser.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._browser.wait_for("Page.loadEventFired", self._session)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, or what its promise gives."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def look(self, *, width: int, height: int, dark: bool = False, paper: bool = False) -> None:
        """A window of this size, in light or dark colours, or the page as it is printed."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip
        colours = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call(
            "Emulation.setEmulatedMedia", media="print" if paper else "screen", features=[colours]
        )

    def picture(self, *, whole: bool = True) -> bytes:
        """A screenshot of the whole page, as PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(data["data"])

    def paper(self) -> bytes:
        """The page as PDF."""
        data = self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
        return base64.b64decode(data["data"])

    @property
    def complaints(self) -> list[str]:
        """Console messages, exceptions and log entries (a violated policy is one) since `open`."""
        found = []
        for event in self._browser.events:
            method, parameters = event.get("method"), event.get("params", {})
            if method == "Runtime.consoleAPICalled":
                found.append(str(parameters["args"]))
            elif method == "Runtime.exceptionThrown":
                found.append(str(parameters["exceptionDetails"]))
            elif method == "Log.entryAdded":
                found.append(f"{parameters['entry']['source']}: {parameters['entry']['text']}")
            elif method == "Network.loadingFailed":
                found.append(str(parameters["errorText"]))
        return found

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for since `open`: neither in the page itself nor held back."""
        happened = [
            (event.get("method"), event.get("params", {})) for event in self._browser.events
        ]
        held_back = {
            each["requestId"] for method, each in happened
            if method == "Network.loadingFailed" and each.get("blockedReason") == "csp"
        }  # fmt: skip
        return [
            str(each["request"]["url"]) for method, each in happened
            if method == "Network.requestWillBeSent" and each["requestId"] not in held_back
            and not each["request"]["url"].startswith("data:")
        ]  # fmt: skip


@pytest.fixture(scope="session")
def browser(browser_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    running = Browser(browser_path, tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def tab(browser: Browser) -> Tab:
    return Tab(browser)
