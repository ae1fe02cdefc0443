"""Have `flows` and `tasks` be this installation's, whatever else Python would find by these names.

Both names are common, and Python takes the first that it finds: in the folder that it is started
in, in those of PYTHONPATH, and only then among what is installed. The script `nested-tune` begins
here, and so does each process that we start and that imports the two:

    python -P -m nested_core.process.our_packages MODULE ARGUMENTS
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMON_NAMES = ("flows", "tasks")
RUN_MODULE = ("-P", "-m", "nested_core.process.our_packages")  # Python's arguments before a module


class _OurFinder(PathFinder):
    """A finder of Python's imports that knows our two packages alone."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Find one of our two packages beside this one; None for any other module."""
        return super().find_spec(name, [str(ROOT)]) if name in COMMON_NAMES else None


def prefer_our_packages() -> None:
    """Have later imports of `flows` and `tasks` find ours.

    Raises ImportError where another module of that name was imported before.
    """
    for name in COMMON_NAMES:
        file = getattr(sys.modules.get(name, sys), "__file__", None)
        if file is not None and ROOT not in Path(file).resolve().parents:
            raise ImportError(
                f"nested-tune has a package {name}, and this process has imported another module "
                f"of that name already: {file}. Import nested-tune's first, or rename that one."
            )
    if _OurFinder not in sys.meta_path:
        sys.meta_path.insert(0, _OurFinder)


def main() -> int:
    """Run the command line, `nested-tune`; return its exit code."""
    prefer_our_packages()
    return int(import_module("flows.cli").main())


if __name__ == "__main__":
    prefer_our_packages()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
