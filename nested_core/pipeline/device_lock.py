"""One run at a time computes on one GPU, by a lock of the operating system.

A work pool's limit holds only while the server knows what runs: after a crash of the worker or the
server, a run may go on that nobody counts. The operating system releases the lock when the process
that holds it ends, in whatever way. A CPU is not locked: the system shares it out itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlx.core as mx

from nested_core import backend
from nested_core.storage.strict_files import user_folder

# The name of a device to lock in place of the one that is found, or "off".
VARIABLE = "NESTED_TUNE_DEVICE_LOCK"
SECONDS_BETWEEN_TRIES = 0.5

OnWait = Callable[[str], None]


@contextmanager
def locking_devices(on_wait: OnWait | None = None, processes: int = 1) -> Iterator[None]:
    """Hold this process's GPU, or one for each of several processes, while the block runs.

    Waits for another process that holds one; `on_wait` is then called, once a device, with a line
    that names that process. Several devices are always taken in the same order, so that two runs
    never wait for each other. When the block ends, memory that MLX keeps for reuse is freed.
    """
    devices = sorted(device_names(processes))
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(_locking_device(device, on_wait))
        try:
            yield
        finally:
            if devices:
                mx.clear_cache()


@contextmanager
def _locking_device(device: str, on_wait: OnWait | None) -> Iterator[None]:
    path = lock_path(device)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        _acquire_lock(descriptor, device, path, on_wait)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def device_names(processes: int = 1) -> tuple[str, ...]:
    """The names of the GPUs that so many processes use on this machine; empty on a CPU.

    On CUDA each process has its own, the first ones of CUDA_VISIBLE_DEVICES; a Mac has one GPU.
    """
    configured = os.environ.get(VARIABLE)
    if configured is not None:
        return () if configured == "off" else (configured,)
    if backend.device() == "cpu":
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if backend.has_cuda() else "0"
    listed = visible.split(",") if visible else map(str, range(processes))
    return tuple(f"gpu-{number.strip()}" for number in listed)[:processes]


def lock_path(device: str) -> Path:
    """The lock file of a device, in this user's runtime folder."""
    folder = user_folder(
        f"the lock of device {device}",
        f"Set XDG_RUNTIME_DIR to a folder of your own, or {VARIABLE}=off to train unlocked.",
        given=os.environ.get("XDG_RUNTIME_DIR"),
    )
    return folder / f"device-{hashlib.sha256(device.encode()).hexdigest()[:16]}.lock"


def _acquire_lock(descriptor: int, device: str, path: Path, on_wait: OnWait | None) -> None:
    has_reported = False
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None and not has_reported:
                holder = path.read_text() or "unknown"
                on_wait(f"device {device} is in use by process {holder}: waiting until it is free")
            has_reported = True
            time.sleep(SECONDS_BETWEEN_TRIES)
