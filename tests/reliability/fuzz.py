"""Fuzz one parser: `python -m tests.reliability.fuzz TARGET --seconds 600 --seed 0`.

A child process parses input after input under a limit of memory; each has a limit of time. Whatever
is no success and no refusal of ours is a finding: it is written into a folder and makes the exit
code 1. A child that dies or hangs leaves the input that it was at, and another goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.reliability.fuzz_inputs import MAX_INPUT_BYTES, InputGenerator
from tests.reliability.fuzz_targets import TARGETS, FuzzTarget

MEMORY_BYTES = 512 * 2**20  # beyond what the process holds once it has parsed the corpus
HANG_SECONDS = 120.0
PREPARED_SHARE = 3  # of four inputs, where a target has a `prepare`


class Progress:
    """Which input a child is at, in a file that outlives it: counts, then the input itself."""

    SIZE = 24 + 2 * MAX_INPUT_BYTES

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(self.SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.SIZE)

    def write(self, count: int, findings: int, content: bytes) -> None:
        self._map[:24] = struct.pack("<QQQ", count, findings, len(content))
        self._map[24 : 24 + len(content)] = content

    def read(self) -> tuple[int, int, bytes]:
        count, findings, size = struct.unpack("<QQQ", self._map[:24])
        return count, findings, bytes(self._map[24 : 24 + size])


def parse_one(target: FuzzTarget, content: bytes) -> tuple[str, str | None]:
    """The parser's answer in a word, and what is wrong with it: a traceback, or None."""
    started = time.process_time()
    problem = None
    try:
        target.parse(content)
        answer = "accepted"
    except target.refusals as refusal:
        answer = f"{type(refusal).__name__} {str(refusal)[-60:]}"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        answer = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
        problem = traceback.format_exc()
    seconds = time.process_time() - started
    if seconds > target.seconds:
        answer, problem = "slow", f"took {seconds:.1f} s of processor time"
    return answer, problem


def write_finding(folder: Path, content: bytes, answer: str, problem: str) -> bool:
    """Write the input and what it did, once an answer; return whether it is a new one."""
    name = hashlib.sha256(answer.encode()).hexdigest()[:12]
    if (folder / f"{name}.txt").exists():
        return False
    (folder / f"{name}.bin").write_bytes(content)
    (folder / f"{name}.txt").write_text(f"{answer}\n{problem}")
    print(f"finding {name}: {answer}", file=sys.stderr)
    return True


def limit_memory(more: int) -> None:
    """Let this process map so many bytes more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def work(name: str, seconds: float, seed: int, folder: Path) -> None:
    """Parse inputs until the time is over; in a child process."""
    target = TARGETS[name]
    progress = Progress(folder / "progress")
    count, findings, _ = progress.read()
    for content in target.corpus:
        parse_one(target, content)
    if sys.platform == "linux":
        limit_memory(MEMORY_BYTES)
    generator = InputGenerator(target.corpus, target.tokens, seed + count)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        content = generator.next()
        if target.prepare is not bytes and count % 4 < PREPARED_SHARE:
            content = target.prepare(content)
        count += 1
        progress.write(count, findings, content)
        answer, problem = parse_one(target, content)
        if problem is None:
            generator.learn(content, answer)
        elif write_finding(folder, content, answer, problem):
            findings += 1
    progress.write(count, findings, b"")


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> int:
    """Fuzz a target for so long; returns the number of findings, which are in `folder`."""
    progress = Progress(folder / "progress")
    started = time.monotonic()
    deaths = 0
    while (left := seconds - (time.monotonic() - started)) > 0:
        command = [sys.executable, "-m", "tests.reliability.fuzz", name, "--work", str(folder)]
        child = subprocess.Popen([*command, "--seconds", str(left), "--seed", str(seed + deaths)])
        before = progress.read()[0]
        if _wait(child, progress) == 0:
            break
        deaths += 1
        count, _, content = progress.read()
        if count == before:
            print(f"{name}: the child parsed nothing; see above", file=sys.stderr)
            return deaths
        answer = f"the process ended with {child.returncode} at input {count}"
        write_finding(folder, content, answer, "It died, or it hung and was killed.")
    count, findings, _ = progress.read()
    took = time.monotonic() - started
    print(
        f"{name}: {count:,} inputs in {took:.0f} s ({count / took:.0f}/s), seed {seed}, "
        f"{findings + deaths} findings in {folder}"
    )
    return findings + deaths


def _wait(child: subprocess.Popen[bytes], progress: Progress) -> int:
    """The child's exit code; one that stays at one input for too long is killed."""
    last, since = -1, time.monotonic()
    while child.poll() is None:
        time.sleep(0.5)
        count = progress.read()[0]
        if count != last:
            last, since = count, time.monotonic()
        elif time.monotonic() - since > HANG_SECONDS:
            child.send_signal(signal.SIGKILL)
            child.wait()
    return child.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=[*TARGETS])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where findings are written; default: a new one")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.target, arguments.seconds, arguments.seed, arguments.work)
        return 0
    folder = arguments.out or Path(tempfile.mkdtemp(prefix=f"fuzz-{arguments.target}-"))
    folder.mkdir(parents=True, exist_ok=True)
    return 1 if fuzz(arguments.target, arguments.seconds, arguments.seed, folder) else 0


if __name__ == "__main__":
    sys.exit(main())
