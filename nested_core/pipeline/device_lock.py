"""One run at a time computes on a GPU, by a lock of the operating system.

A work pool's limit holds only while the server knows what runs: after a crash of the worker or the
server, a run may go on that nobody counts. The operating system releases the lock when the process
that holds it ends. A CPU is not locked; the system shares it between processes.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlx.core as mx

from nested_core import backend
from nested_core.models.session import Session
from nested_core.storage.lock_file import OnBusy, exclusive_lock_with_holder_id, read_holder
from nested_core.storage.untrusted_files import private_user_folder

# The name of a device to lock in place of the one that is found, or "off".
DEVICE_LOCK_VARIABLE = "NESTED_TUNE_DEVICE_LOCK"
SECONDS_BETWEEN_TRIES = 0.5

OnWait = Callable[[str], None]


@contextmanager
def locking_devices(
    on_wait: OnWait | None = None, processes: int = 1, session: Session | None = None
) -> Iterator[None]:
    """Hold the lock of one GPU for each of `processes` during the block.

    If another process holds a lock, wait; `on_wait` is then called once per device with a line that
    names that process, and the session releases its base model. Several devices are always locked
    in the same order, so two runs cannot deadlock. After the block, memory that MLX caches is
    freed.
    """
    devices = sorted(device_names(processes))
    with ExitStack() as stack:
        for device in devices:
            path = lock_path(device)
            on_busy = _tell_once(device, path, on_wait, session)
            stack.enter_context(exclusive_lock_with_holder_id(path, mode=0o600, on_busy=on_busy))
        try:
            yield
        finally:
            if devices:
                mx.clear_cache()


def device_names(processes: int = 1) -> tuple[str, ...]:
    """Return the names of the GPUs that `processes` processes use here; empty on a CPU.

    On CUDA each process has its own, the first ones of CUDA_VISIBLE_DEVICES; a Mac has one GPU.
    """
    configured = os.environ.get(DEVICE_LOCK_VARIABLE)
    if configured is not None:
        return () if configured == "off" else (configured,)
    if backend.device() == "cpu":
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if backend.computes_on_cuda() else "0"
    listed = visible.split(",") if visible else map(str, range(processes))
    return tuple(f"gpu-{number.strip()}" for number in listed)[:processes]


def lock_path(device: str) -> Path:
    """Return the path of a device's lock file, in this user's runtime folder."""
    folder = private_user_folder(
        f"the lock of device {device}",
        f"Set XDG_RUNTIME_DIR to a folder of your own, or {DEVICE_LOCK_VARIABLE}=off to train "
        "unlocked.",
        given=os.environ.get("XDG_RUNTIME_DIR"),
    )
    return folder / f"device-{hashlib.sha256(device.encode()).hexdigest()[:16]}.lock"


def _tell_once(device: str, path: Path, on_wait: OnWait | None, session: Session | None) -> OnBusy:
    """Return an `on_busy` that waits, and calls `on_wait` at its first call only."""
    has_reported = False

    def on_busy() -> None:
        """Say who has the device, once, and wait until the next try."""
        nonlocal has_reported
        if session is not None:
            session.release_base()  # its memory is the other process's to use
        if on_wait is not None and not has_reported:
            holder = read_holder(path) or "unknown"
            on_wait(f"device {device} is in use by process {holder}: waiting until it is free")
        has_reported = True
        time.sleep(SECONDS_BETWEEN_TRIES)

    return on_busy
