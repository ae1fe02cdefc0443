"""doctor: what this machine has, what is missing, and how each failure is mended."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from flows.commands.check import Check, DoctorChecks
from flows.commands.command_output import result_printer
from flows.terminal.console import print_table
from nested_core import seams
from nested_core.errors import NestedTuneError, quote_path
from nested_core.text.digest_format import shorten_digest

MIN_FREE_DISK_BYTES = 2 * 10**9


def add_commands(commands: Any) -> None:
    """Add the command."""
    doctor = commands.add("doctor", run_doctor, "Start", json=True)
    doctor.add_argument(
        "--registry",
        type=Path,
        default=Path("registry"),
        metavar="DIR",
        help="whose champions are checked (default: registry)",
    )


def run_doctor(arguments: argparse.Namespace) -> Callable[[], int]:
    """Check what this machine has and lacks.

    And the server of PREFECT_API_URL, where that names one.
    """
    looks = (
        _check_python,
        _check_packages,
        _check_mlx,
        _check_blas,
        _check_compiler,
        _check_kernels,
        _check_server_address,
        _check_disk,
    )
    checks = [*(check() for check in looks), *_iterate_champion_checks(arguments.registry)]
    if os.environ.get("PREFECT_API_URL"):
        checks += (check for room in seams.load_all(DoctorChecks) for check in room.of_server())

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
    """Return which required packages are installed, and whether their versions fit; no extras."""
    found, unfit = [f"nested-tune {version('nested-tune')}"], []
    for requirement in map(Requirement, requires("nested-tune") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            unfit.append(f'"{requirement}"')
            continue
        found.append(f"{requirement.name} {installed}")
        if not requirement.specifier.contains(installed, prereleases=True):
            unfit.append(f'"{requirement}"')
    return Check(
        "packages", not unfit, ", ".join(found), f"pip install {' '.join(unfit)}" if unfit else ""
    )


def _check_mlx() -> Check:
    """Return the device that MLX computes on, or why it cannot be imported."""
    from nested_core import backend

    try:
        seen = f"default device: {backend.device()}"
    except ImportError as error:
        mend = 'on Linux: pip install "nested-tune[cpu]" or "nested-tune[cuda]", never both'
        return Check("mlx", False, str(error), mend)
    if backend.device() == "gpu" and not backend.computes_on_cuda():
        seen += " (Metal, where this project was never run: please send python -m benchmarks.apple)"
        mend = "while it trains keep the Mac awake, its display off: docs/troubleshooting.md"
        return Check("mlx", True, seen, mend)
    return Check("mlx", True, seen)


def _check_blas() -> Check:
    from nested_core import backend

    if sys.platform != "linux":
        return Check("BLAS", True, "the system's")
    library = backend.prepare()
    if library is not None:
        return Check("BLAS", True, library)
    mend = "optional, some 20 times faster on a CPU: apt-get install libopenblas0-pthread"
    return Check("BLAS", True, "reference BLAS of the mlx wheel (slow)", mend)


def _check_compiler() -> Check:
    from nested_core import backend

    if backend.can_compile_kernels():
        return Check("compiler", True, "mx.compile fuses kernels")
    return Check("compiler", True, "none: mx.compile runs uncompiled", "optional: install g++")


def _check_kernels() -> Check:
    """Return whether this project's CUDA kernels are used; without them steps are slower."""
    from nested_core import backend

    if not backend.is_mlx_built_for_cuda():
        return Check("kernels", True, "MLX's own; ours are for CUDA")
    try:
        seen = f"faster CUDA kernels, compiled by cuda-core {version('cuda-core')}"
        return Check("kernels", True, seen)
    except PackageNotFoundError:
        mend = 'optional, shorter steps: pip install "nested-tune[cuda]"'
        return Check("kernels", True, "MLX's own: for ours, cuda-core is missing", mend)


def _check_server_address() -> Check:
    url = os.environ.get("PREFECT_API_URL")
    none = "no server configured: each `nested-tune run` starts one of its own"
    return Check("prefect", True, f"server {url}" if url else none)


def _iterate_champion_checks(registry: Path) -> Iterator[Check]:
    """For each name of the registry, whether its champion is what was registered."""
    from nested_core.registry import list_names, read_champion, verify

    for name in list_names(registry) if registry.is_dir() else ():
        try:
            champion = read_champion(registry, name)
            if champion is None:
                continue
            verify(registry, name, champion)
        except (NestedTuneError, OSError) as error:
            mend = f"nested-tune audit --registry {quote_path(registry)} names all that is damaged"
            yield Check(f"champion {name}", False, str(error), mend)
        else:
            yield Check(f"champion {name}", True, f"{shorten_digest(champion)}, as registered")


def _check_disk() -> Check:
    free = shutil.disk_usage(".").free
    mend = "" if free > MIN_FREE_DISK_BYTES else "free space, or run in a folder on another disk"
    return Check("disk", free > MIN_FREE_DISK_BYTES, f"{free / 1e9:.1f} GB free here", mend)
