"""Headless Chromium by its DevTools protocol: open a page, read its words, take a picture."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx
from websockets.sync.client import ClientConnection, connect

from tests.production.processes import end, start_logged
from tests.production.stack import wait_for

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--enable-unsafe-swiftshader",  # the graph of a run is drawn by WebGL, here without a GPU
    "--hide-scrollbars",
)
WIDTH, HEIGHT = 1280, 800
SECONDS_TO_SHOW = 60.0


def find_chromium() -> str | None:
    """The program, or None where there is none on PATH."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a browser with a profile of its own."""

    def __init__(self, program: str, folder: Path) -> None:
        # Chromium's sandbox refuses to run as root.
        flags = [*FLAGS, f"--user-data-dir={folder}", *(["--no-sandbox"] * (os.geteuid() == 0))]
        folder.mkdir()
        command = [program, *flags, "about:blank"]
        # A socket's path has about 100 characters at most; importing mlx sets a longer TMPDIR.
        self._process = start_logged(command, folder / "log", folder, {"TMPDIR": "/tmp"})
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []  # what was heard from the page, since `watch`
        try:
            self._page = self._connect(folder / "DevToolsActivePort")
            self.resize(HEIGHT)
        except BaseException:
            end(self._process)
            raise

    def _connect(self, port_file: Path) -> ClientConnection:
        wait_for(lambda: port_file.exists() and len(port_file.read_text().splitlines()) == 2)
        port = port_file.read_text().splitlines()[0]
        pages = httpx.get(f"http://127.0.0.1:{port}/json/list", timeout=30).json()
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        # Pings draw from the global `random`; a browser on this machine needs none.
        return connect(address, max_size=None, open_timeout=30, ping_interval=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._page.close()
        end(self._process)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._page.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:  # events come in between
            answer = json.loads(self._page.recv(timeout=SECONDS_TO_SHOW))
            if "method" in answer:
                self.events.append(answer)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def resize(self, height: int, width: int = WIDTH) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str) -> None:
        """Have the page believe that the person prefers `light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def watch(self) -> None:
        """From now on `events` gets what the page logs, raises and asks the network for."""
        for domain in ("Runtime", "Log", "Network", "Page"):
            self._call(f"{domain}.enable")
        self.events.clear()

    def requests(self) -> list[str]:
        """The addresses that the page asked for since `watch`, the page's own among them."""
        return [
            str(event["params"]["request"]["url"])
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def messages(self) -> list[str]:
        """What the page's console showed since `watch`: messages, errors, refusals."""
        shown = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in shown]

    def whole_picture(self) -> bytes:
        """The page from its top to its end, as PNG."""
        done = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(done["data"])

    def open(self, url: str) -> None:
        """Go there and wait until the document is loaded; its scripts may still be at work."""
        self._call("Page.navigate", url=url)
        wait_for(lambda: self.run("document.readyState") == "complete", SECONDS_TO_SHOW)

    def words(self) -> str:
        """The text that a person sees."""
        return str(self.run("document.body.innerText"))

    def wait_for_words(self, words: Sequence[str]) -> str:
        """The page's text once all of these are in it."""
        deadline = time.monotonic() + SECONDS_TO_SHOW
        while missing := [word for word in words if word not in (seen := self.words())]:
            assert time.monotonic() < deadline, f"not on the page: {missing}\n{seen}"
            time.sleep(0.3)
        return seen

    def shows_its_pictures(self) -> bool:
        """Whether every picture of the page is there, and drawn with a width."""
        script = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
        return bool(self.run(script))

    def choose_tab(self, title: str) -> None:
        """Press the tab of this title: one UI hears the button going down, the other the click."""
        is_it = f"element => !element.children.length && element.innerText == '{title}'"
        tab = f"[...document.querySelectorAll('*')].find({is_it})"
        press = "new MouseEvent('mousedown', {bubbles: true, button: 0})"
        both = f"(tab => tab && (tab.dispatchEvent({press}), tab.click(), true))"
        wait_for(lambda: self.run(f"{both}({tab})"), SECONDS_TO_SHOW)

    def picture(self, selector: str | None = None) -> bytes:
        """What is seen as PNG: all of it, or of the first element that the selector finds."""
        options: dict[str, Any] = {"format": "png"}
        if selector is not None:
            box = self.run(
                f"(r => [r.x, r.y, r.width, r.height])"
                f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
            )
            options["clip"] = dict(zip(("x", "y", "width", "height"), box, strict=True))
            options["clip"]["scale"] = 1
        return base64.b64decode(self._call("Page.captureScreenshot", **options)["data"])
