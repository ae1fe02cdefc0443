"""Each file of a run folder and of a version spoilt in each way, and every command that reads it.

A command ends in bounded time with the exit code that damage has, naming the file, or it does its
work and what it leaves is what the run had before.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest

from nested_core.storage.adapter import files_sha256, read_adapter
from tests.builders.file_damage import halve, link_to_a_device, make_pipe
from tests.example import SMALL_RUN, write_config
from tests.flows.conftest import Ended, called
from tests.reliability.run_folder_edits import Case, cases

SECONDS = 120  # for one command, on a machine that does much else
MEMORY_BYTES = 8 * 2**30
NAME = "capitals"


@dataclass(frozen=True)
class Originals:
    """Two finished runs, the first's configuration file, and a registry that holds both."""

    run: Path
    other: Path
    config: Path
    registry: Path

    def versions(self) -> list[Path]:
        return sorted((self.registry / NAME / "versions").iterdir())


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    folder = tmp_path_factory.mktemp("edited")
    for name, seed in (("run", 0), ("other", 5)):
        config = write_config(folder / f"{name}.yaml", **SMALL_RUN, seed=seed)
        done = called("train", "-c", config, "--run-dir", folder / name, cwd=folder)
        assert done.code == 0, done.stderr
        promote = ("promote", folder / name, "--name", NAME, "--registry", folder / "registry")
        assert called(*promote, cwd=folder).code == 0
    return Originals(folder / "run", folder / "other", folder / "run.yaml", folder / "registry")


@contextmanager
def bounded() -> Iterator[None]:
    """Fail what takes too long or maps too much, as a reader of a pipe or of /dev/zero would."""

    def fail(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGALRM, fail)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def command(*arguments: object, cwd: Path) -> Ended:
    with bounded(), warnings.catch_warnings(action="always"):  # the command line shows them
        return called(*arguments, cwd=cwd)


def require_refusal(case: Case, done: Ended, code: int = 6) -> None:
    """A short message that names the file, or the folder of it that was to be read."""
    assert done.code == code, (str(case), done)
    message = done.stderr[done.stderr.rindex("nested-tune: ") :]
    assert "Traceback" not in done.stderr, (str(case), done)
    assert len(message.splitlines()) <= 14, (str(case), done)
    names = (case.file, *map(str, Path(case.file).parents[:-1]))
    assert any(name in done.stderr for name in names), (str(case), done)


def look(case: Case, originals: Originals, tmp_path: Path) -> Counter[str]:
    """status, stop and promote of one spoilt run."""
    ends: Counter[str] = Counter()
    run = tmp_path / "spoilt" / "run"
    case.apply(originals.run, originals.other, run)
    has_no_config = case.file == "config.yaml" and not os.path.lexists(run / "config.yaml")
    status = command("status", run, cwd=tmp_path)
    if status.code != 0:
        require_refusal(case, status, 2 if has_no_config else 6)
    stop = command("stop", run, cwd=tmp_path)
    if stop.code != 2:
        require_refusal(case, stop)
    registry = tmp_path / "registry"
    shutil.copytree(originals.registry, registry, symlinks=True)
    arguments = ("promote", run, "--name", "new", "--registry", registry)
    promote = command(*arguments, cwd=tmp_path)
    if promote.code == 0:
        (version,) = (registry / "new" / "versions").iterdir()
        assert version.name in {path.name for path in originals.versions()}, str(case)
        assert files_sha256(version) == files_sha256(originals.run / "adapter"), str(case)
    else:
        is_absent = has_no_config or (case.file == "gate.json" and not (run / "gate.json").exists())
        require_refusal(case, promote, 2 if is_absent else 6)
    for name, done in (("status", status), ("stop", stop), ("promote", promote)):
        ends[f"{name} {done.code}"] += 1
    return ends


def resume(case: Case, originals: Originals, tmp_path: Path) -> Counter[str]:
    """`train --resume` of one spoilt run; the adapter that it leaves is the one that it had."""
    run = tmp_path / "spoilt" / "run"
    case.apply(originals.run, originals.other, run)
    arguments = ("train", "-c", originals.config, "--run-dir", run, "--resume")
    done = command(*arguments, cwd=tmp_path)
    if done.code == 0:
        assert files_sha256(run / "adapter") == files_sha256(originals.run / "adapter"), str(case)
        assert command("status", run, cwd=tmp_path).code == 0, str(case)
    else:
        differs = case.file == "config.yaml" and "that differs" in done.stderr
        require_refusal(case, done, 2 if differs else 6)
    return Counter([f"--resume {done.code}"])


def verify(case: Case, originals: Originals, tmp_path: Path) -> Counter[str]:
    """`verify` of a spoilt adapter folder: where it passes, it has judged what is on disk now."""
    run = tmp_path / "spoilt" / "run"
    case.apply(originals.run, originals.other, run)
    done = command("verify", run / "initial", run / "adapter", "--json", cwd=tmp_path)
    if done.code in (0, 4):
        for side, name in (("initial", "initial"), ("trained", "adapter")):
            digest = read_adapter(run / name, follow_links=True).digest()
            assert done.document[side]["digest"] == digest, str(case)
    else:
        require_refusal(case, done)
    return Counter([f"verify {done.code}"])


def every(count: int | None, all_cases: list[Case]) -> list[Case]:
    """All cases, or so many spread over them."""
    step = 1 if count is None else max(1, len(all_cases) // count)
    return all_cases[::step]


FULL = pytest.param(None, marks=[pytest.mark.reliability, pytest.mark.timeout(7200)])


def require_all(
    check: Callable[[Case, Originals, Path], Counter[str]],
    chosen: list[Case],
    originals: Originals,
    tmp_path: Path,
) -> Counter[str]:
    """Check each case in a folder of its own; all that went wrong is shown at once."""
    ends: Counter[str] = Counter()
    problems = []
    for number, case in enumerate(chosen):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            ends += check(case, originals, folder)
        except AssertionError as error:
            problems.append(f"{case}: {error}")
        shutil.rmtree(folder)
    print(sorted(ends.items()))
    assert problems == [], "\n".join(problems)
    return ends


@pytest.mark.slow("commands on many damaged copies of a run")
@pytest.mark.parametrize("count", [24, FULL])
def test_status_stop_and_promote_of_a_spoilt_run_name_the_file_or_change_nothing(
    originals: Originals, tmp_path: Path, count: int | None
) -> None:
    chosen = every(count, cases(originals.run, originals.other))
    ends = require_all(look, chosen, originals, tmp_path)
    assert ends["promote 6"] > ends["promote 0"]


@pytest.mark.slow("commands on many damaged copies of a run")
@pytest.mark.parametrize("count", [4, FULL])
def test_a_spoilt_run_is_resumed_to_the_same_adapter_or_refused_by_the_files_name(
    originals: Originals, tmp_path: Path, count: int | None
) -> None:
    chosen = every(count, cases(originals.run, originals.other))
    require_all(resume, chosen, originals, tmp_path)


@pytest.mark.slow("commands on many damaged copies of a run")
@pytest.mark.parametrize("count", [3, FULL])
def test_verify_refuses_a_spoilt_adapter_or_judges_what_is_there(
    originals: Originals, tmp_path: Path, count: int | None
) -> None:
    all_cases = cases(originals.run, originals.other)
    of_adapters = [case for case in all_cases if case.file.startswith(("initial/", "adapter/"))]
    require_all(verify, every(count, of_adapters), originals, tmp_path)


@pytest.mark.slow("commands on many damaged copies of a run")
@pytest.mark.parametrize("count", [12, FULL])
def test_a_spoilt_version_is_named_by_audit_and_never_promoted(originals, tmp_path, count) -> None:
    first, second = originals.versions()

    def check(case: Case, originals: Originals, folder: Path) -> Counter[str]:
        registry = folder / "registry"
        shutil.copytree(originals.registry, registry, symlinks=True)
        version = registry / NAME / "versions" / first.name
        shutil.rmtree(version)
        case.apply(first, second, version)
        audit = command("audit", NAME, "--registry", registry, cwd=folder)
        assert audit.code == 6, (str(case), audit)
        arguments = ("rollback", NAME, "--to", first.name, "--registry", registry)
        rollback = command(*arguments, cwd=folder)
        assert rollback.code in (2, 6), (str(case), rollback)
        return Counter([f"rollback {rollback.code}"])

    require_all(check, every(count, cases(first, second)), originals, tmp_path)


@pytest.mark.slow("commands on many damaged copies of a run")
def test_a_damaged_result_is_made_again_from_sound_checkpoints(originals, tmp_path) -> None:
    edits = {halve, make_pipe, link_to_a_device}
    all_cases = cases(originals.run, originals.other)
    chosen = [case for case in all_cases if case.file == "result.json" and case.edit in edits]
    ends = require_all(resume, chosen, originals, tmp_path)
    assert ends == Counter({"--resume 0": 3})


@pytest.mark.slow("commands on many damaged copies of a run")
def test_the_edits_start_from_all_that_training_leaves(originals: Originals) -> None:
    names = {case.file for case in cases(originals.run, originals.other)}
    assert {"config.yaml", "gate.json", "metrics.jsonl", "result.json", "run.lock"} <= names
    assert "checkpoints/step-0000008/optimizer.safetensors" in names
