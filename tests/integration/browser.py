"""A headless Chromium, driven through its DevTools protocol: opens pages, waits for what they show, takes pictures."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE_S = 90.0


class Browser:
    """One tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._ids = count(1)

    def open(self, url: str, *texts: str) -> str:
        """Open a page, wait until it shows all of `texts`, and return all that it shows."""
        # A change of what follows the # alone would not load anything.
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        return self.wait_for(*texts)

    def wait_for(self, *texts: str) -> str:
        """Wait until the page shows all of `texts`, and return all that it shows."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            shown = str(self.evaluate("document.body ? document.body.innerText : ''"))
            missing = [text for text in texts if text not in shown]
            if not missing:
                return shown
            assert time.monotonic() < deadline, f"{missing} never came; the page shows:\n{shown}"
            time.sleep(0.25)

    def scroll_to(self, text: str) -> None:
        """Scroll down until the page shows `text`: long lists draw only what is in view."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in str(self.evaluate("document.body.innerText")):
            assert time.monotonic() < deadline, f"'{text}' never came"
            self.evaluate("document.querySelectorAll('*').forEach(part => part.scrollBy(0, 200))")
            time.sleep(0.25)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression on the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write a picture of what is in view as PNG, as soon as it has stopped changing."""
        deadline = time.monotonic() + PATIENCE_S
        before, picture = "", self._picture()
        while picture != before and time.monotonic() < deadline:
            time.sleep(1)
            before, picture = picture, self._picture()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(picture))

    def _picture(self) -> str:
        return str(self.call("Page.captureScreenshot", format="png")["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self._ids)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=PATIENCE_S))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])


@contextmanager
def open_browser(folder: Path, *, width: int = 1440, height: int = 1100) -> Iterator[Browser]:
    """Start Chromium with a profile of its own in `folder`, and end it."""
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
        *(f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"),
    ]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = _address(folder, process)
        (tab,) = [tab for tab in httpx.get(f"{address}/json", trust_env=False).json() if tab["type"] == "page"]
        with connect(tab["webSocketDebuggerUrl"], max_size=None, open_timeout=PATIENCE_S, proxy=None) as connection:
            browser = Browser(connection)
            # The window's own size counts its missing frame.
            browser.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
            yield browser
    finally:
        process.terminate()
        process.wait(timeout=30)


def _address(folder: Path, process: subprocess.Popen[bytes]) -> str:
    file = folder / "DevToolsActivePort"
    deadline = time.monotonic() + PATIENCE_S
    while not (file.exists() and file.read_text().count("\n")):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "chromium.log").read_text()
        time.sleep(0.1)
    return f"http://127.0.0.1:{file.read_text().splitlines()[0]}"
