"""MLX's compiled kernels: nobody else's are loaded, none that are torn, and each is made once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nested_core import backend
from nested_core.errors import ConfigError
from nested_core.rooms.kernel_folder.compiled_kernels import (
    IN_USE_NAME,
    PROCESS_FOLDER_PREFIX,
    KernelStore,
    is_complete_kernel,
    open_kernel_store_folder,
)
from nested_core.storage.user_tmpdir import KERNELS_FOLDER_VARIABLE, USER_TMPDIR_VARIABLE

ROOT = Path(__file__).resolve().parents[3]
NOBODY = 65534
KERNEL = "mlx/1/cpu/libkernel.so"
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or backend.device() != "cpu" or shutil.which("g++") is None,
    reason="MLX compiles with g++ on a Linux CPU alone",
)

COMPUTE = """
import os, signal, sys
from pathlib import Path
if "prepared" in sys.argv:
    from nested_core import backend
    backend.prepare()
import mlx.core as mx
assert mx.compile(lambda x: mx.exp(x) * x - 3)(mx.zeros(3)).tolist() == [-3.0] * 3
(library,) = Path(os.environ["TMPDIR"]).rglob("*.so")
print(library)
if "torn" in sys.argv:
    library.write_bytes(library.read_bytes()[:2000])
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
PLANTED = """
#include <cstdlib>
#include <fstream>
__attribute__((constructor)) static void run() { std::ofstream(getenv("PLANTED")) << "ran"; }
"""


def compute(tmp_path: Path, *words: str, code: int = 0, **environment: str) -> str:
    """Compute with a compiled kernel in a new process; return where the kernel was."""
    clean = {k: v for k, v in os.environ.items() if k != USER_TMPDIR_VARIABLE}
    folders = {KERNELS_FOLDER_VARIABLE: str(tmp_path / "kernels"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPUTE, *words],
        env=clean | folders | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout.strip()


@pytest.mark.slow("a process that compiles a kernel")
@needs_compiler
def test_a_library_that_another_user_planted_is_not_loaded(tmp_path: Path) -> None:
    library = Path(compute(tmp_path))
    assert library.is_relative_to(tmp_path / "mlx")  # without prepare, as plain MLX
    library.unlink()
    source = tmp_path / "planted.cpp"
    source.write_text(PLANTED)
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    if os.getuid() == 0:
        os.chown(library, NOBODY, NOBODY)
        os.chown(library.parent, NOBODY, NOBODY)
    trace = tmp_path / "trace"
    own = Path(compute(tmp_path, "prepared", PLANTED=str(trace)))
    assert own.is_relative_to(tmp_path / "kernels")
    assert not trace.exists()
    compute(tmp_path, code=1, PLANTED=str(trace))  # it has no kernel, but its constructor
    assert trace.read_text() == "ran"


@pytest.mark.slow("processes that compile a kernel")
@needs_compiler
def test_a_kernel_is_compiled_once_and_not_loaded_where_a_kill_left_it_torn(tmp_path: Path) -> None:
    torn = Path(compute(tmp_path, "prepared", "torn", code=-signal.SIGKILL))
    assert torn.stat().st_size == 2000
    made = Path(compute(tmp_path, "prepared"))
    assert not torn.parents[3].exists()
    assert not made.parents[3].exists()
    (recorded,) = (tmp_path / "kernels").rglob("*.so")
    before = recorded.stat()
    compute(tmp_path, "prepared")
    assert recorded.stat().st_ino == before.st_ino
    assert recorded.stat().st_mtime_ns == before.st_mtime_ns


FOLDERS = """
import os, subprocess, sys, tempfile
tempfile.gettempdir()  # a child of a prepared process may ask before it is prepared itself
from nested_core import backend
from nested_core.storage.user_tmpdir import environment_with_user_tmpdir
backend.prepare()
print(os.environ["TMPDIR"], tempfile.gettempdir(), flush=True)
if len(sys.argv) < 2:
    subprocess.run([sys.executable, __file__, "child"], check=True)
    if os.fork() == 0:
        sys.exit()  # cleanly, with what is registered for the end of its parent
    os.wait()
    print(os.path.isdir(os.environ["TMPDIR"]), environment_with_user_tmpdir()["TMPDIR"])
"""


def test_temporary_files_stay_in_the_users_folder_and_a_child_has_kernels_of_its_own(
    tmp_path: Path,
) -> None:
    program = tmp_path / "program.py"
    program.write_text(FOLDERS)
    (tmp_path / "temporary").mkdir()
    folders = {
        KERNELS_FOLDER_VARIABLE: str(tmp_path / "kernels"),
        "TMPDIR": str(tmp_path / "temporary"),
    }
    environment = os.environ | folders | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(program)], env=environment, stdout=subprocess.PIPE)
    own, temporary, childs, childs_temporary, is_kept, outer = done.stdout.decode().split()
    assert temporary == childs_temporary == outer == str(tmp_path / "temporary")
    assert Path(own).parent == Path(childs).parent
    assert own != childs
    assert is_kept == "True"
    assert not Path(own).exists()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelStore:
    """A store with one kernel, recorded by a process that has ended."""
    monkeypatch.setenv(KERNELS_FOLDER_VARIABLE, str(tmp_path / "kernels"))
    made = KernelStore(open_kernel_store_folder())
    compile_one(made)
    return made


def compile_one(store: KernelStore, name: str = KERNEL) -> Path:
    folder = store.new_process_folder()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(minimal_library())
    store.record(folder)
    return folder


def minimal_library() -> bytes:
    """The header of a 64-bit ELF file that ends with its two section headers of 64 bytes."""
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    header[0x28:0x30] = (64).to_bytes(8, "little")
    header[0x3A:0x3C] = (64).to_bytes(2, "little")
    header[0x3C:0x3E] = (2).to_bytes(2, "little")
    return bytes(header) + bytes(128)


def test_what_was_recorded_is_there_for_the_next_process(store: KernelStore) -> None:
    folder = store.new_process_folder()
    assert (folder / KERNEL).read_bytes() == minimal_library()
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("edit", ["flipped", "truncated", "a link", "a pipe", "not recorded"])
def test_a_kernel_without_its_recorded_digest_is_removed(store, tmp_path, edit) -> None:
    (recorded,) = (tmp_path / "kernels").rglob("recorded/**/*.so")
    content = recorded.read_bytes()
    recorded.unlink()
    if edit == "a link":
        (tmp_path / "elsewhere").write_bytes(content)
        recorded.symlink_to(tmp_path / "elsewhere")
    elif edit == "a pipe":
        os.mkfifo(recorded)
    elif edit == "not recorded":
        recorded = recorded.with_name("libother.so")
        recorded.write_bytes(content)
    else:
        recorded.write_bytes(content[:-1] if edit == "truncated" else content[:-1] + b"x")
    assert not list(store.new_process_folder().rglob("*.so"))
    assert not recorded.is_symlink()
    assert not recorded.exists()
    assert (compile_one(store) / KERNEL).exists()  # it is compiled and recorded again
    assert (store.new_process_folder() / KERNEL).exists()


def test_a_damaged_record_removes_every_kernel_and_is_made_again(store, tmp_path) -> None:
    (record,) = (tmp_path / "kernels").rglob("recorded.json")
    record.write_bytes(b"\0" * 100)
    assert not list(store.new_process_folder().rglob("*.so"))
    compile_one(store)
    assert (store.new_process_folder() / KERNEL).exists()


@pytest.mark.parametrize("size", [0, 63, 64, 191])
def test_a_library_that_ends_before_its_section_headers_is_not_recorded(
    store: KernelStore, tmp_path: Path, size: int
) -> None:
    folder = store.new_process_folder()
    unfinished = folder / KERNEL
    unfinished.with_name("libnew.so").write_bytes(minimal_library()[:size])
    assert is_complete_kernel(unfinished)
    store.record(folder)
    assert [path.name for path in store.new_process_folder().rglob("*.so")] == ["libkernel.so"]


ABANDONED = """
from pathlib import Path
import sys
from nested_core.rooms.kernel_folder.compiled_kernels import KernelStore
print(KernelStore(Path(sys.argv[1])).new_process_folder())
"""


def test_a_folder_stays_for_as_long_as_its_process_lives(store: KernelStore) -> None:
    own = store.new_process_folder()
    command = [sys.executable, "-c", ABANDONED, str(own.parent)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    abandoned = Path(done.stdout.strip())
    assert abandoned.exists()
    store.new_process_folder()
    assert own.exists()
    assert not abandoned.exists()


def test_a_folder_whose_lock_is_a_link_is_nobodys(store: KernelStore) -> None:
    own = store.new_process_folder()
    (own / IN_USE_NAME).unlink()
    (own / IN_USE_NAME).symlink_to("nowhere")
    assert store.new_process_folder().exists()
    assert not own.exists()


def make_unsafe(folder: Path, how: str) -> None:
    """Make a folder for kernels that somebody else could plant code in."""
    if how == "link":
        folder.symlink_to(folder.parent)
        return
    folder.mkdir()
    if how == "open":
        folder.chmod(0o777)
    elif how == "open above":
        folder.parent.chmod(0o777)
    else:
        os.chown(folder if how == "given away" else folder.parent, NOBODY, NOBODY)


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("link", "is a link"),
        ("open", "belongs to or can be written by others"),
        ("open above", "/above, where .* can be written by others"),
        ("given away", "/kernels, where .* belongs to"),
        ("given away above", "/above, where .* belongs to"),
    ],
)
def test_a_folder_that_others_could_plant_code_in_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, problem: str
) -> None:
    if "given away" in how and os.getuid() != 0:
        pytest.skip("only root gives a folder away")
    folder = tmp_path / "above" / "kernels"
    folder.parent.mkdir()
    make_unsafe(folder, how)
    monkeypatch.setenv(KERNELS_FOLDER_VARIABLE, str(folder))
    with pytest.raises(ConfigError, match=problem):
        open_kernel_store_folder()


UNUSABLE = """
import os
from nested_core import backend
backend.prepare()
print(os.environ["TMPDIR"])
print(oct(os.stat(os.environ["TMPDIR"]).st_mode & 0o777))
"""


def test_where_kernels_cannot_be_kept_they_go_into_a_temporary_folder_and_that_is_said(
    tmp_path: Path,
) -> None:
    (tmp_path / "kernels").touch()
    environment = os.environ | {
        KERNELS_FOLDER_VARIABLE: str(tmp_path / "kernels"),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", UNUSABLE],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    folder, mode = done.stdout.split()
    assert Path(folder).parent == tmp_path
    assert Path(folder).name.startswith(PROCESS_FOLDER_PREFIX)
    assert mode == "0o700"
    assert not Path(folder).exists()
    assert done.stderr.startswith("MLX compiles its kernels for this process alone, and not again")
    assert str(tmp_path / "kernels") in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_others_recorded_meanwhile_is_linked_and_nothing_that_was_changed(tmp_path) -> None:
    one, other = KernelStore(tmp_path), KernelStore(tmp_path)
    folder, others = one.new_process_folder(), other.new_process_folder()
    assert not one.has_linked_any()
    for name in ("sound", "changed"):
        (others / f"{name}.ptx").write_text(name)
        (others / f"{name}.txt").write_text("kernel\tname")
    (folder / "own.ptx").write_text("compiled here")
    other.record(others)
    (others / "changed.ptx").write_text("another program")  # the recorded one is a link to it
    assert one.link_recorded(folder) == 1
    assert (folder / "sound.ptx").read_text() == "sound"
    assert sorted(path.name for path in folder.glob("*.ptx")) == ["own.ptx", "sound.ptx"]
    assert one.link_recorded(folder) == 0
    assert one.has_linked_any()
