"""A private folder for the kernels that MLX compiles, so that no code of another user is loaded.

On a Linux CPU, MLX compiles kernels with g++ into $TMPDIR/mlx, in place, and loads whatever lies
there (mlx/backend/cpu/compiled.cpp; with CUDA the same holds for PTX, cuda/jit_module.cpp). So each
process gets a TMPDIR of its own, with hard links to the kernels that earlier processes recorded by
their digest when they ended cleanly. No process loads what another one is still writing, and what a
killed process left is never loaded again.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from nested_core.backend import KernelFolder
from nested_core.errors import ConfigError, DamagedError, NestedTuneError
from nested_core.storage.atomic import write_json
from nested_core.storage.lock_file import exclusive_lock, lock_open_file, read_holder
from nested_core.storage.untrusted_files import file_type, read_json_object, regular_sha256
from nested_core.storage.user_cache import UserCache, cache_folder, given_folder
from nested_core.storage.user_tmpdir import KERNELS_FOLDER_VARIABLE, USER_TMPDIR_VARIABLE

PROCESS_FOLDER_PREFIX = "nested-tune-kernels-"
IN_USE_NAME = ".in-use"  # locked for as long as the process of a folder lives
LOCK_NAME = ".lock"
LOCK_SECONDS = 10.0
DIGESTS_NAME = "recorded.json"
UNFINISHED_NAME = ".copy"  # of a kernel that is copied
RECORDED_FOLDER_NAME = "recorded"
NAMES_SUFFIX = ".txt"  # of the file in which MLX lists a CUDA program's kernels, beside its .ptx
NVIDIA_GPUS_FOLDER = Path("/proc/driver/nvidia/gpus")
# Of a 64-bit ELF header: where the section headers begin (8 bytes), their size and number (2 each).
ELF_SECTION_TABLE_OFFSET = slice(0x28, 0x30)
ELF_SECTION_HEADER_SIZE = slice(0x3A, 0x3C)
ELF_SECTION_COUNT = slice(0x3C, 0x3E)
ELF_MAGIC = b"\x7fELF"

_log = logging.getLogger(__name__)
_process_store: tuple[KernelStore, Path] | None = None  # of this process, with its folder


def use_private_kernel_folder() -> Path:
    """Make TMPDIR a folder that no other process compiles into; temporary files stay elsewhere.

    Python's temporary files go on going where TMPDIR pointed before. Child processes inherit the
    folder, and have one of their own if they call this too. Where kernels cannot be kept, a log
    line says why, and they are compiled into a temporary folder that goes with the process.
    """
    global _process_store
    _use_user_tmpdir_for_tempfile()
    try:
        store = KernelStore(open_kernel_store_folder())
        folder = store.new_process_folder()
        _process_store = store, folder
    except (OSError, RuntimeError, NestedTuneError) as error:  # RuntimeError: there is no home
        _log.warning("MLX compiles its kernels for this process alone, and not again: %s", error)
        folder = _temporary_kernel_folder()
    else:
        atexit.register(_record_at_exit, store, folder, os.getpid())
    os.environ["TMPDIR"] = str(folder)
    return folder


def began_without_kernels() -> bool:
    """Tell if this process keeps kernels, and began when this machine had none recorded."""
    return _process_store is not None and not _process_store[0].has_linked_any()


def take_recorded_kernels() -> int:
    """Link what other processes recorded since this one began; how many kernels that are."""
    if _process_store is None:
        return 0
    store, folder = _process_store
    return store.link_recorded(folder)


def _use_user_tmpdir_for_tempfile() -> None:
    """Have `tempfile` use the user's TMPDIR from now on, here and in child processes."""
    if _is_kernel_folder(os.environ.get("TMPDIR")):  # inherited
        os.environ["TMPDIR"] = os.environ.get(USER_TMPDIR_VARIABLE, "")
    if _is_kernel_folder(tempfile.tempdir):  # asked for before
        tempfile.tempdir = None
    with suppress(FileNotFoundError):  # there is no folder for temporary files at all
        os.environ[USER_TMPDIR_VARIABLE] = tempfile.gettempdir()  # which it remembers


def _is_kernel_folder(folder: str | None) -> bool:
    return folder is not None and Path(folder).name.startswith(PROCESS_FOLDER_PREFIX)


def _temporary_kernel_folder() -> Path:
    """Return a folder that goes with this process; a path without a folder if none can be made.

    MLX then says at the first kernel that the folder is missing, and loads nothing.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=PROCESS_FOLDER_PREFIX))
    except OSError as error:
        _log.warning("No folder for MLX's kernels can be made: %s", error)
        return Path(os.devnull, PROCESS_FOLDER_PREFIX)
    atexit.register(_remove_at_exit, folder, os.getpid())
    return folder


def open_kernel_store_folder() -> Path:
    """Open the folder of this user, MLX version and machine type; make it if missing (mode 0700).

    It lies in $NESTED_TUNE_KERNELS, else in `kernels` of the folder for caches. ConfigError if the
    folder is a link, another user's, writable by others, or may not hold programs.
    """
    root = given_folder(KERNELS_FOLDER_VARIABLE) or cache_folder() / "kernels"
    folder = root / _machine_type()
    danger = "have this process run their code"
    for place in (root, folder):
        is_link = place.is_symlink()
        if not is_link:
            UserCache(place, "MLX's kernels", danger, KERNELS_FOLDER_VARIABLE).require_usable()
        if is_link or os.statvfs(place).f_flag & os.ST_NOEXEC:
            problem = "is a link" if is_link else "is mounted noexec"
            raise ConfigError(
                f"{place}, where MLX's kernels are kept, {problem}. Set {KERNELS_FOLDER_VARIABLE} "
                f"to a folder that is yours alone."
            )
    return folder


def _machine_type() -> str:
    """Name what compiled kernels depend on: MLX, the processor, the C library and the GPUs."""
    library = os.confstr("CS_GNU_LIBC_VERSION") if hasattr(os, "confstr") else None
    gpus = sorted(path.read_bytes() for path in NVIDIA_GPUS_FOLDER.glob("*/information"))
    words = [f"mlx-{metadata.version('mlx')}", os.uname().machine, library or "no-glibc"]
    if gpus:
        words.append(hashlib.sha256(b"".join(gpus)).hexdigest()[:8])
    return "-".join(words).replace(" ", "-")


class KernelStore:
    """Recorded kernels, and a folder for each process that uses them; one writer at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._recorded = folder / RECORDED_FOLDER_NAME
        self._digests = folder / DIGESTS_NAME
        self._linked: set[str] = set()  # what the folder of this process began with

    def new_process_folder(self) -> Path:
        """Make a folder that stays locked until this process ends, with links to all recorded.

        Removes folders whose processes are gone, and every kernel that is not as it was recorded.
        """
        with self._locked():
            self._remove_abandoned_folders()
            sound = self._remove_damaged_kernels()
            folder = Path(tempfile.mkdtemp(prefix=PROCESS_FOLDER_PREFIX, dir=self._folder))
            in_use = folder / IN_USE_NAME
            lock_open_file(os.open(in_use, os.O_RDWR | os.O_CREAT, 0o600), in_use)  # never closed
            self._link(sound, folder)
        return folder

    def has_linked_any(self) -> bool:
        """Return whether anything was recorded for the folder of this process."""
        return bool(self._linked)

    def link_recorded(self, folder: Path) -> int:
        """Link what was recorded since into a process's folder; how many kernels are new in it."""
        with self._locked():
            names = [one for one in self._remove_damaged_kernels() if not (folder / one).exists()]
            self._link(names, folder)
        return sum(not name.endswith(NAMES_SUFFIX) for name in names)

    def _link(self, names: list[str], folder: Path) -> None:
        # The list of a program's kernels before the program, which MLX looks for first.
        for name in sorted(names, key=lambda name: not name.endswith(NAMES_SUFFIX)):
            link_or_copy(self._recorded / name, folder / name)
        self._linked.update(names)

    def record(self, folder: Path) -> None:
        """Keep the kernels that were compiled in a process's folder, with their digests."""
        new = [
            name
            for name in file_names(folder)
            if name not in self._linked and is_complete_kernel(folder / name)
        ]
        if not new:
            return
        with self._locked():
            digests = self._read_digests()
            for name in new:
                recorded = self._recorded / name
                if name not in digests or not recorded.exists():
                    recorded.unlink(missing_ok=True)
                    link_or_copy(folder / name, recorded)
                    digests[name] = regular_sha256(recorded)
            write_json(self._digests, digests)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path, deadline = self._folder / LOCK_NAME, time.monotonic() + LOCK_SECONDS

        def wait() -> None:
            if time.monotonic() >= deadline:
                raise BlockingIOError(f"another process works in {self._folder}")
            time.sleep(0.01)

        with exclusive_lock(path, mode=0o600, on_busy=wait):
            yield

    def _remove_abandoned_folders(self) -> None:
        """Remove the folders of processes that have ended: nobody holds their lock."""
        for folder in self._folder.glob(f"{PROCESS_FOLDER_PREFIX}*"):
            in_use = folder / IN_USE_NAME
            if file_type(in_use) != "file" or read_holder(in_use) is None:
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_damaged_kernels(self) -> list[str]:
        """Remove kernels that do not have their recorded digest; return the names of the others."""
        digests = self._read_digests()
        sound = []
        for name in file_names(self._recorded):
            path = self._recorded / name
            if file_type(path) == "file" and digests.get(name) == regular_sha256(path):
                sound.append(name)
            else:
                path.unlink()
        return sound

    def _read_digests(self) -> dict[str, str]:
        """Return the digest of each recorded kernel by its name; empty if the record is damaged."""
        try:
            return read_json_object(self._digests)
        except DamagedError:  # or there is none yet
            return {}


def file_names(folder: Path) -> list[str]:
    """List the files below a folder by their paths from there."""
    start = len(str(folder)) + 1
    return [f"{place}/{name}"[start:] for place, _, names in os.walk(folder) for name in names]


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link, or a copy on a file system without such links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        target.parent.mkdir(parents=True)
        link_or_copy(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV):
            raise
        unfinished = target.with_name(UNFINISHED_NAME)
        shutil.copyfile(source, unfinished)
        unfinished.replace(target)


def is_complete_kernel(path: Path) -> bool:
    """Return whether a file is what MLX loads again, and not a library that g++ did not finish.

    A linker writes the ELF header and the section headers, which end the file, at last.
    """
    if path.suffix in (".ptx", NAMES_SUFFIX):
        return path.is_file()
    if path.suffix != ".so":
        return False
    with path.open("rb") as file:
        header = file.read(64)
        size = file.seek(0, os.SEEK_END)
    sections = int.from_bytes(header[ELF_SECTION_HEADER_SIZE], "little") * int.from_bytes(
        header[ELF_SECTION_COUNT], "little"
    )
    end = int.from_bytes(header[ELF_SECTION_TABLE_OFFSET], "little") + sections
    return header.startswith(ELF_MAGIC) and sections > 0 and end <= size


def _record_at_exit(store: KernelStore, folder: Path, process: int) -> None:
    """Record what was compiled, unless this is a process that was forked from the one meant."""
    if os.getpid() == process:
        with suppress(OSError, NestedTuneError):  # they are compiled again
            store.record(folder)
        _remove_at_exit(folder, process)


def _remove_at_exit(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


KERNEL_FOLDER = KernelFolder(use_private_kernel_folder)
