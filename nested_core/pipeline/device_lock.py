"""One training process at a time on one device, by a lock of the operating system.

A work pool's limit holds only while the server knows what runs: after a crash of worker or server a
training may go on that nobody counts. The lock goes with the process that holds it, however that
one ends. A CPU is not locked, for the system shares it out itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nested_core import backend
from nested_core.storage.strict_files import user_folder

VARIABLE = (
    "NESTED_TUNE_DEVICE_LOCK"  # a name of a device to lock in place of the one found, or "off"
)
SECONDS_BETWEEN_TRIES = 0.5

OnWait = Callable[[str], None]


@contextmanager
def exclusive_device(on_wait: OnWait | None = None, ranks: int = 1) -> Iterator[None]:
    """Hold this process's device, or one for each rank, while the block runs.

    It waits for whoever holds one; `on_wait` is called then, once a device, with a line that names
    the holder. Several are taken in one order, so that nobody waits in a circle.
    """
    with ExitStack() as stack:
        for device in sorted(device_names(ranks)):
            stack.enter_context(_held(device, on_wait))
        yield


@contextmanager
def _held(device: str, on_wait: OnWait | None) -> Iterator[None]:
    path = lock_path(device)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        _acquire(descriptor, device, path, on_wait)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def device_names(ranks: int = 1) -> tuple[str, ...]:
    """What names the devices of so many ranks on this machine; none where they are CPUs.

    On CUDA each has its own, the first of CUDA_VISIBLE_DEVICES; a Mac has one for all.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        return () if given == "off" else (given,)
    if backend.device() == "cpu":
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if backend.has_cuda() else "0"
    listed = visible.split(",") if visible else map(str, range(ranks))
    return tuple(f"gpu-{number.strip()}" for number in listed)[:ranks]


def lock_path(device: str) -> Path:
    """The lock's file, in this user's runtime folder, named after the device."""
    folder = user_folder(
        f"the lock of device {device}",
        f"Set XDG_RUNTIME_DIR to a folder of your own, or {VARIABLE}=off to train unlocked.",
        given=os.environ.get("XDG_RUNTIME_DIR"),
    )
    return folder / f"device-{hashlib.sha256(device.encode()).hexdigest()[:16]}.lock"


def _acquire(descriptor: int, device: str, path: Path, on_wait: OnWait | None) -> None:
    has_told = False
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None and not has_told:
                holder = path.read_text() or "unknown"
                on_wait(f"device {device} is in use by process {holder}: waiting until it is free")
            has_told = True
            time.sleep(SECONDS_BETWEEN_TRIES)
