"""What it costs `nested-tune serve` that Prometheus scrapes it, and what Prometheus then shows.

    python -m benchmarks.scraping [--prometheus PATH] [--pairs 30] [--seconds 10]

Two clients ask the example's champion without a pause. In each pair there is a stretch in which a
Prometheus server scrapes every five seconds, and one in which it runs and scrapes nothing; which
comes first changes from pair to pair. Of each, the processor time of the serving process a request
is taken (user and system, of Linux' /proc). Then another version is promoted under load, and
Prometheus is asked for the version before and after. promtool, beside prometheus, checks /metrics.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nested_core import backend

backend.prepare()  # before anything imports mlx

from benchmarks.timing import keep  # noqa: E402
from tests.example import MODEL  # noqa: E402
from tests.rooms.serve.versions import (  # noqa: E402
    NAME,
    make_base,
    promote_run,
    write_version_run,
)

INTERVAL = 5
CLIENTS = 2
BAR = 0.01
SCRAPES = 500
QUESTION = json.dumps({"prompt": "I want to see Italy. Where to?", "max_tokens": 12})
INFO = f'nested_tune_adapter_info{{name="{NAME}"}}'
SWAPS = f'nested_tune_swaps_total{{name="{NAME}"}}'
TICKS = os.sysconf("SC_CLK_TCK")
CONFIG = """\
global: {{scrape_interval: {interval}s}}
scrape_configs:
  - job_name: nested-tune
    static_configs: [{{targets: [{targets}]}}]
"""


class Load:
    """Clients that ask without a pause, and count the answers."""

    def __init__(self, address: str) -> None:
        self.answers = 0
        self.has_ended = False
        self._address = address
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=300)
        while not self.has_ended:
            connection.request("POST", "/v1/completions", QUESTION)
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise SystemExit(f"the server answered {answer.status}")
            self.answers += 1
        connection.close()

    def end(self) -> None:
        """Have them finish."""
        self.has_ended = True
        for thread in self._threads:
            thread.join()


def processor_seconds(process: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure(process: int, load: Load, seconds: float) -> float:
    """Processor milliseconds of a process for each answer, over so many seconds."""
    began, answers = processor_seconds(process), load.answers
    time.sleep(seconds)
    return 1000 * (processor_seconds(process) - began) / (load.answers - answers)


@contextmanager
def serving(registry: Path, folder: Path) -> Iterator[tuple[int, str]]:
    """`nested-tune serve` at a free port: its process and HOST:PORT."""
    command = [sys.executable, "-m", "flows.cli", "serve", "--registry", str(registry)]
    log = folder / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--name", NAME, "--port", "0"], stderr=file)
    try:
        while (found := re.search(r" at http://(\S+)", log.read_text())) is None:
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.2)
        yield process.pid, found[1]
    finally:
        process.terminate()
        process.wait()


class Prometheus:
    """A Prometheus server that scrapes the serving process, or for a while does not."""

    def __init__(self, program: Path, target: str, folder: Path) -> None:
        self._config = folder / "prometheus.yml"
        self._log = folder / "prometheus.log"
        self._target = target
        self._write(is_scraping=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = [f"--config.file={self._config}", f"--storage.tsdb.path={folder / 'samples'}"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(program), *flags, f"--web.listen-address={self.address}"], stderr=log
            )
        while not ask(self.address, INFO):
            if self._process.poll() is not None:
                raise SystemExit(self._log.read_text())
            time.sleep(0.2)

    def scrape(self, is_scraping: bool) -> None:
        """Scrape from now on, or not, by another configuration, which SIGHUP has it read."""
        self._write(is_scraping)
        self._process.send_signal(signal.SIGHUP)

    def _write(self, is_scraping: bool) -> None:
        targets = f'"{self._target}"' if is_scraping else ""
        self._config.write_text(CONFIG.format(interval=INTERVAL, targets=targets))

    def end(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


def ask(prometheus: str, query: str) -> list[dict[str, Any]]:
    """What its HTTP API answers to a query; nothing while it starts."""
    connection = http.client.HTTPConnection(prometheus, timeout=60)
    try:
        connection.request("GET", f"/api/v1/query?query={quote(query)}")
        answer = json.load(connection.getresponse())
    except (ConnectionError, ValueError):
        return []
    finally:
        connection.close()
    found: list[dict[str, Any]] = answer.get("data", {}).get("result", [])
    return found


def versions_shown(prometheus: str) -> list[str]:
    """The versions in Prometheus' newest samples."""
    return [found["metric"]["version"] for found in ask(prometheus, INFO)]


def check_by_promtool(promtool: Path, metrics: bytes) -> None:
    """End the program where promtool finds anything."""
    done = subprocess.run(
        [str(promtool), "check", "metrics"], input=metrics, capture_output=True, check=False
    )
    if done.returncode or done.stdout or done.stderr:
        raise SystemExit(f"promtool: {(done.stdout + done.stderr).decode()}")


def read_metrics(target: str) -> bytes:
    """What /metrics answers."""
    connection = http.client.HTTPConnection(target, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read()
    connection.close()
    return text


def measure_a_scrape(process: int, target: str) -> float:
    """Processor milliseconds of the server for one scrape, while nobody else asks."""
    began = processor_seconds(process)
    for _ in range(SCRAPES):
        read_metrics(target)
    return 1000 * (processor_seconds(process) - began) / SCRAPES


def show_swap(own: str, promote: Path, registry: Path) -> None:
    """Promote another version, and print what Prometheus shows before and after."""
    before = versions_shown(own)
    began = time.monotonic()
    promoted = promote_run(promote, registry)
    while versions_shown(own) != [promoted] or not (counted := ask(own, SWAPS)):
        if time.monotonic() - began > 120:
            raise SystemExit(f"Prometheus shows {versions_shown(own)}, and not {promoted}")
        time.sleep(0.2)
    seconds = time.monotonic() - began
    print(f"scraping: {before[0][:12]} before, {promoted[:12]} {seconds:.1f} s after a promotion")
    print(f"scraping: swaps {counted[0]['value'][1]}")


def main() -> None:
    """Print the cost, a line a pair, and what Prometheus shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", type=Path, default=shutil.which("prometheus"))
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    if arguments.prometheus is None:
        raise SystemExit("There is no prometheus: apt-get install prometheus, or --prometheus PATH")
    with tempfile.TemporaryDirectory() as name:
        compare(Path(name), arguments)


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    """Serve, ask, scrape in turn, and promote."""
    promtool = arguments.prometheus.with_name("promtool")
    base = make_base(MODEL, folder / "base")
    runs = [write_version_run(folder / f"run-{seed}", base, seed) for seed in (1, 2)]
    registry = folder / "registry"
    promote_run(runs[0], registry)
    with serving(registry, folder) as (process, target):
        prometheus, load = Prometheus(arguments.prometheus, target, folder), Load(target)
        try:
            measure(process, load, arguments.seconds)  # a warm-up
            pairs = list(measure_pairs(process, load, prometheus, arguments))
            prometheus.scrape(True)
            show_swap(prometheus.address, runs[1], registry)
        finally:
            load.end()
            prometheus.end()
        check_by_promtool(promtool, read_metrics(target))
        scrape_ms = measure_a_scrape(process, target)
    print("scraping: promtool finds nothing in /metrics")
    median = statistics.median(scraped / plain for scraped, plain in pairs)
    print(f"scraping: median of {len(pairs)} pairs {median:.4f}, bar {1 + BAR}")
    share = scrape_ms / (1000 * INTERVAL)
    print(f"scraping: {scrape_ms:.2f} ms a scrape: {share:.3%} of a core at one each {INTERVAL} s")
    keep("scraping", {"pairs": pairs, "median": median, "scrape_ms": scrape_ms})


def measure_pairs(
    process: int, load: Load, prometheus: Prometheus, arguments: argparse.Namespace
) -> Iterator[tuple[float, float]]:
    """Milliseconds a request, scraped and not, of each pair."""
    for pair in range(arguments.pairs):
        took = {}
        for is_scraping in (True, False) if pair % 2 else (False, True):
            prometheus.scrape(is_scraping)
            took[is_scraping] = measure(process, load, arguments.seconds)
        print(
            f"scraping: pair {pair + 1}: {took[True]:.2f} and {took[False]:.2f} ms a request, "
            f"scraped and not: {took[True] / took[False]:.4f}",
            flush=True,
        )
        yield took[True], took[False]


if __name__ == "__main__":
    main()
