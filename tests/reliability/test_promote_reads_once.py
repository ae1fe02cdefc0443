"""`nested-tune promote` under strace: how often each file of the run and of the version is read."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nested_core.pipeline import steps
from tests.example import train_example

TRACED = "openat,read,pread64,readv,mmap,sendfile,copy_file_range"
OPENED = re.compile(r'openat\([^"]*"[^"]+".*= (\d+)<([^>]+)>')
READ = re.compile(r"(?:read|pread64|readv|sendfile|copy_file_range|mmap)\(.*?(\d+)<(/[^>]+)>")


def reads_by_path(trace: Path) -> Counter[str]:
    """How often each path was opened, and then read or mapped, by Python or a library."""
    unread: set[tuple[str, str]] = set()
    counts: Counter[str] = Counter()
    for line in trace.read_text(errors="replace").splitlines():
        if opened := OPENED.search(line):
            unread.add((opened[1], opened[2]))
        elif (read := READ.search(line)) and (read[1], read[2]) in unread:
            unread.remove((read[1], read[2]))
            counts[read[2]] += 1
    return counts


@pytest.mark.slow("trains and judges a run, and promotes it under strace")
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_a_promotion_reads_the_verdict_and_each_manifest_once_and_the_adapter_once_where_written(
    tmp_path: Path,
) -> None:
    done = train_example(tmp_path / "run", iters=4)
    steps.judge(done.config, done.run)
    promote = ["promote", "run", "--registry", "registry", "--name", "capitals"]
    command = ["strace", "-f", "-y", "-o", "trace", "-e", f"trace={TRACED}"]
    command += [sys.executable, "-m", "flows.cli", *promote]
    traced = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (traced.returncode, traced.stdout[:9]) == (0, "promoted:"), traced.stderr
    counts = reads_by_path(tmp_path / "trace")
    run = done.run.path
    (manifest,) = run.glob("checkpoints/*/MANIFEST.json")
    for path in (run / "gate.json", run / "MANIFEST.json", manifest):
        assert counts[str(path)] == 1, path
    for folder in (run / "initial", run / "adapter", manifest.parent):
        for name in ("adapters.safetensors", "adapter_config.json"):
            assert 1 <= counts[str(folder / name)] <= 2, folder / name
    written = Counter(
        Path(path).name for path in counts.elements() if "/registry/capitals/versions/" in path
    )
    assert written == {"adapters.safetensors": 1, "adapter_config.json": 1}
