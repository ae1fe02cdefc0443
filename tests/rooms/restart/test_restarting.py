"""The small parent of a command that trains: what it begins again, and what it does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nested_core.errors import TrainingProcessLost
from nested_core.process.command_parent import PARENT_VARIABLE
from nested_core.rooms.restart import restarting
from nested_core.rooms.restart.restarting import describe_end, run_again_where_killed
from tests.waiting import wait_until

pytestmark = pytest.mark.slow("starts processes, and ends them")

# Tells of its run, writes the checkpoints that `made` names for its start, and ends as it is told.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from nested_core.process.command_parent import (
    RunInHand,
    aborting_where_metal_failed,
    list_earlier_ends,
    tell_parent,
)

run, ends, restarts, made = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), sys.argv[4]
signal.signal(signal.SIGTERM, lambda number, frame: os.abort())
tell_parent(RunInHand(run, restarts))
begun = len((run / "begun").read_text().splitlines()) if (run / "begun").exists() else 0
with (run / "begun").open("a") as file:
    print(*list_earlier_ends(), "|", *sys.argv[5:], file=file)
if made == "always" or made == str(begun):
    (run / "checkpoints" / f"step-{begun + 1:07d}").mkdir(parents=True)
end = ends[min(begun, len(ends) - 1)]
if end == "wait":
    (run / "waits").write_text(str(os.getpid()))
    time.sleep(60)
if end == "metal":
    with aborting_where_metal_failed():
        raise RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity")
if not end.isdigit():
    os.kill(os.getpid(), getattr(signal, end))
sys.exit(int(end))
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    (tmp_path / "run").mkdir()
    return [sys.executable, str(program), str(tmp_path / "run")]


def begun(tmp_path: Path) -> list[str]:
    """For each start, the signals that ended those before it, and the words that were added."""
    return (tmp_path / "run" / "begun").read_text().splitlines()


def test_it_is_begun_again_with_the_words_to_resume_until_it_ends(tmp_path, words, capfd) -> None:
    ends = "SIGKILL,SIGTRAP,SIGSEGV,SIGBUS,SIGFPE,metal,5"
    code = run_again_where_killed([*words, ends, "3", "always"], lambda run: ("--on", run.name))
    assert code == 5
    assert begun(tmp_path) == [
        "|",
        "SIGKILL | --on run",
        "SIGKILL SIGTRAP | --on run",
        "SIGKILL SIGTRAP SIGSEGV | --on run",
        "SIGKILL SIGTRAP SIGSEGV SIGBUS | --on run",
        "SIGKILL SIGTRAP SIGSEGV SIGBUS SIGFPE | --on run",
        "SIGKILL SIGTRAP SIGSEGV SIGBUS SIGFPE SIGABRT | --on run",
    ]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert told[0].startswith(
        "warning: it was killed (SIGKILL), as a system does when memory runs out."
    )
    assert told[0].endswith(" It goes on from step-0000001, by itself.")
    assert "ended by SIGFPE" in told[4]
    assert "from step-0000005" in told[4]
    assert "ended by SIGABRT" in told[5]


@pytest.mark.parametrize(("made", "starts"), [("never", 4), ("1", 5)])
def test_without_a_new_checkpoint_it_is_begun_again_so_often_and_no_more(
    tmp_path: Path, words: list[str], made: str, starts: int
) -> None:
    with pytest.raises(TrainingProcessLost, match="4 times in a row without a new checkpoint"):
        run_again_where_killed([*words, "SIGKILL", "3", made])
    assert len(begun(tmp_path)) == starts


def parent(*command: str, under: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    module = [sys.executable, "-P", "-m", "nested_core.rooms.restart.restarting"]
    return subprocess.Popen([*under, *module, *command[1:]], stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("end", "restarts", "code"),
    [("3", "3", 3), ("SIGKILL", "0", -signal.SIGKILL), ("SIGTERM", "3", -signal.SIGABRT)],
)
def test_any_other_end_is_its_own(tmp_path, words, end, restarts, code) -> None:
    if end == "SIGTERM":  # whoever asks it to stop wants no other, even where it then aborts
        process = parent(*words, "wait", restarts, "always")
        wait_until((tmp_path / "run" / "waits").exists)
        process.terminate()
    else:
        process = parent(*words, end, restarts, "always")
    assert process.wait(30) == code
    assert len(begun(tmp_path)) == 1


# Sends itself SIGTERM in the moment between the start of the command and the note of its process.
SIGNALLED_AT_THE_START = """
import os, signal, sys
from nested_core.rooms.restart import restarting

class Signalled(restarting._Command):
    def __init__(self, *given):
        super().__init__(*given)
        os.kill(os.getpid(), signal.SIGTERM)

restarting._Command = Signalled
sys.exit(restarting.run_again_where_killed([sys.executable, "-c", "import time; time.sleep(60)"]))
"""


def test_a_signal_while_the_command_is_started_ends_it() -> None:
    process = subprocess.run([sys.executable, "-P", "-c", SIGNALLED_AT_THE_START], timeout=30)
    assert process.returncode == -signal.SIGTERM


# Ends by SIGTERM with 5 where the process that it waits for, as for a compiler, goes on.
WITH_A_CHILD = """
import os, pathlib, signal, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
def end(*_):
    time.sleep(0.2)
    sys.exit(5 if child.poll() is None and not child.kill() else 1)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1]).touch()
while True: time.sleep(1)
"""


def test_a_signal_to_end_reaches_the_command_and_not_what_it_waits_for(tmp_path: Path) -> None:
    process = parent(sys.executable, "-c", WITH_A_CHILD, str(tmp_path / "waits"))
    wait_until((tmp_path / "waits").exists, process=process)
    process.terminate()
    assert process.wait(30) == 5


# A thread of a library, as OpenBLAS has them, gets the signal while the main thread waits.
SIGNALLED_IN_A_THREAD = """
import signal, sys, threading, time
from nested_core.rooms.restart import restarting

def take_signal():
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=take_signal, daemon=True).start()
sys.exit(restarting.run_again_where_killed([sys.executable, "-c", "import time; time.sleep(60)"]))
"""


def test_a_signal_that_another_thread_gets_ends_the_command() -> None:
    process = subprocess.run([sys.executable, "-P", "-c", SIGNALLED_IN_A_THREAD], timeout=30)
    assert process.returncode == -signal.SIGTERM


def test_under_nohup_a_closed_terminal_ends_nothing(tmp_path: Path, words: list[str]) -> None:
    process = parent(*words, "wait,3", "3", "always", under=("nohup",))
    waits = tmp_path / "run" / "waits"
    wait_until(lambda: waits.exists() and waits.read_text() != "")
    process.send_signal(signal.SIGHUP)
    os.kill(int(waits.read_text()), signal.SIGKILL)
    assert process.wait(30) == 3, "it is begun again, as nobody asked it to end"


def test_one_that_ends_before_it_tells_of_a_run_is_not_begun_again() -> None:
    kill = "import os, sys; sys.stderr.write('x'); os.kill(os.getpid(), 11)"
    module = [sys.executable, "-P", "-m", "nested_core.rooms.restart.restarting", "-c", kill]
    done = subprocess.run(module, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGSEGV, b"x")


def test_it_ends_with_its_parent(tmp_path: Path, words: list[str]) -> None:
    process = parent(*words, "wait", "3", "never")
    waits = tmp_path / "run" / "waits"
    wait_until(lambda: waits.exists() and waits.read_text() != "")
    process.kill()
    process.wait()
    stat = Path("/proc", waits.read_text(), "stat")
    wait_until(lambda: not stat.exists() or ") Z " in stat.read_text())  # nobody may wait for it


def test_one_whose_parent_ended_before_it_could_look_ends() -> None:
    look = "from nested_core.process import command_parent as p; p.has_parent(); print('goes on')"
    environment = os.environ | {PARENT_VARIABLE: "1:0"}
    done = subprocess.run(
        [sys.executable, "-c", look], env=environment, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


def test_it_stops_and_goes_on_with_its_parent(tmp_path: Path, words: list[str]) -> None:
    process = parent(*words, "wait", "3", "never")
    waits = tmp_path / "run" / "waits"
    wait_until(lambda: waits.exists() and waits.read_text() != "")

    def states() -> set[str]:
        stats = [Path("/proc", str(p), "stat") for p in (process.pid, waits.read_text())]
        return {stat.read_text().rpartition(")")[2].split()[0] for stat in stats}

    process.send_signal(signal.SIGTSTP)
    wait_until(lambda: states() == {"T"})
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: states() == {"S"})
    process.kill()
    process.wait()


# As a kernel of each version of control groups writes them.
GROUPS = {
    "2": (
        "0::/jobs/night",
        "jobs/night/memory.events",
        "low 0\nhigh 0\nmax 412\noom 7\noom_kill 7\noom_group_kill 0\n",
        "jobs/night/memory.max",
    ),
    "1": (
        "9:name=systemd:/\n4:memory:/jobs/night\n0::/",
        "memory/jobs/night/memory.oom_control",
        "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n",
        "memory/jobs/night/memory.limit_in_bytes",
    ),
    "2, in a container": (
        "0::/seen/from/outside",
        "memory.events",
        "oom 7\noom_kill 7\n",
        "memory.max",
    ),
}


@pytest.mark.parametrize("version", GROUPS)
def test_a_kill_for_want_of_memory_is_named_with_the_limit_of_its_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    own, counter, counts, limit = GROUPS[version]
    (tmp_path / "own").write_text(own)
    (tmp_path / counter).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / counter).write_text(counts)
    (tmp_path / limit).write_text("4000000000\n")
    monkeypatch.setattr(restarting, "OWN_CONTROL_GROUPS", tmp_path / "own")
    monkeypatch.setattr(restarting, "CONTROL_GROUPS", tmp_path)
    assert restarting.count_memory_kills() == 7
    said = describe_end(9, was_memory=True)
    assert "because memory ran out: a smaller batch_size" in said
    assert said.endswith("The limit of its control group is 4 GB.")
    assert "memory ran out" not in describe_end(signal.SIGABRT, was_memory=False)


def test_what_helps_on_a_mac_is_named_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1" in describe_end(signal.SIGABRT, was_memory=False)
