"""A webhook on this machine: an HTTP server that keeps what is posted to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET_PATH = "/services/T0/B0/only-whoever-deploys-knows-this"


class WebhookServer(ThreadingHTTPServer):
    """The texts that came, in order; `status` is what it answers.

    Texts with `probe` are left out, and set `was_probed`.
    """

    probe = "sent to see whether alerts come"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.texts: list[str] = []
        self.status = 200
        self.was_probed = threading.Event()

    @property
    def url(self) -> str:
        """Where to post, with a part that nobody is to see."""
        return f"http://127.0.0.1:{self.server_port}{SECRET_PATH}"


class _Handler(BaseHTTPRequestHandler):
    server: WebhookServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert (self.path, self.headers["Content-Type"]) == (SECRET_PATH, "application/json")
        text = json.loads(body)["text"]
        if self.server.probe in text:
            self.server.was_probed.set()
        else:
            self.server.texts.append(text)
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing: standard error is the tests'."""


@contextmanager
def serving_webhook() -> Iterator[WebhookServer]:
    """A webhook that answers until the block ends."""
    with WebhookServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
