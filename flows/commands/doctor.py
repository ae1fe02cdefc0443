"""doctor: what this machine has, what is missing, and how each failure is mended."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flows.commands.command_output import result_printer
from flows.doctor_check import Check
from flows.terminal import print_table

PACKAGES = (
    *("nested-tune", "mlx", "mlx-lm", "prefect", "fastapi", "sqlalchemy", "pandera"),
    "safetensors",
)
MIN_FREE_DISK_BYTES = 2 * 10**9


def add_commands(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    doctor = commands.add_parser("doctor", parents=[shared], help="look this machine over")
    doctor.add_argument("--json", action="store_true", help="the checks as one JSON document")
    doctor.set_defaults(run=run_doctor)


def run_doctor(arguments: argparse.Namespace) -> Callable[[], int]:
    """Look at this machine, and at the server of PREFECT_API_URL where that names one."""
    looks = (
        _check_python,
        _check_packages,
        _check_mlx,
        _check_blas,
        _check_compiler,
        _check_kernels,
        _check_prefect,
        _check_sqlalchemy,
        _check_disk,
    )
    checks = [check() for check in looks]
    if os.environ.get("PREFECT_API_URL"):
        from flows.server_checks import iterate_server_checks

        checks += iterate_server_checks()

    is_fine = all(check.ok for check in checks)
    document = {"ok": is_fine, "checks": [asdict(check) for check in checks]}
    rows = [(c.name, "ok" if c.ok else "LOOK", c.seen, c.mend) for c in checks]

    def show() -> None:
        """The checks as a table."""
        print_table(("check", "", "seen", "what to do"), rows)

    return result_printer(arguments, lambda: document, show, code=0 if is_fine else 1)


def _check_python() -> Check:
    found = sys.version.split()[0]
    is_supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check("python", is_supported, found, "" if is_supported else "use Python 3.11 to 3.13")


def _check_packages() -> Check:
    found, missing = [], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    mend = f"pip install {' '.join(missing)}" if missing else ""
    return Check("packages", not missing, ", ".join(found), mend)


def _check_mlx() -> Check:
    from nested_core import backend

    try:
        seen = f"default device: {backend.device()}"
    except ImportError as error:
        mend = 'on Linux: pip install "nested-tune[cpu]" or "nested-tune[cuda]", never both'
        return Check("mlx", False, str(error), mend)
    return Check("mlx", True, seen)


def _check_blas() -> Check:
    from nested_core import backend

    if sys.platform != "linux":
        return Check("BLAS", True, "the system's")
    library = backend.prepare().blas
    if library is not None:
        return Check("BLAS", True, library)
    mend = "optional, some 10 times faster on a CPU: apt-get install libopenblas0-pthread"
    return Check("BLAS", True, "reference BLAS of the mlx wheel (slow)", mend)


def _check_compiler() -> Check:
    from nested_core import backend

    if backend.can_compile_kernels():
        return Check("compiler", True, "mx.compile fuses kernels")
    return Check("compiler", True, "none: mx.compile runs uncompiled", "optional: install g++")


def _check_kernels() -> Check:
    """What compiles our own kernels; the same is computed without it, more slowly."""
    from nested_core import backend

    if not backend.is_mlx_built_for_cuda():
        return Check("kernels", True, "MLX's")
    try:
        seen = f"our own where they agree with MLX's, by cuda-core {version('cuda-core')}"
        return Check("kernels", True, seen)
    except PackageNotFoundError:
        mend = 'optional, shorter steps: pip install "nested-tune[cuda]"'
        return Check("kernels", True, "MLX's alone: cuda-core is not installed", mend)


def _check_prefect() -> Check:
    url = os.environ.get("PREFECT_API_URL")
    try:
        import prefect.server.api.server  # noqa: F401  # what an unfit fastapi breaks
    except (ImportError, TypeError) as error:
        return Check("prefect", False, str(error)[:100], 'pip install "fastapi>=0.139,<0.151"')
    return Check("prefect", True, f"server {url}" if url else "embedded server")


def _check_sqlalchemy() -> Check:
    """Under SQLAlchemy 2.1 the server of this Prefect starts, and its schedules make no runs."""
    found = version("sqlalchemy")
    is_fit = tuple(map(int, found.split(".")[:2])) < (2, 1)
    mend = "" if is_fit else 'pip install "sqlalchemy<2.1"; schedules make no runs under this one'
    return Check("scheduler", is_fit, f"sqlalchemy {found}", mend)


def _check_disk() -> Check:
    free = shutil.disk_usage(".").free
    mend = (
        "" if free > MIN_FREE_DISK_BYTES else "free some space, or run in a folder on another disk"
    )
    return Check("disk", free > MIN_FREE_DISK_BYTES, f"{free / 1e9:.1f} GB free here", mend)
