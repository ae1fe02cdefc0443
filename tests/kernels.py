"""The header of MLX's kernels, read by g++ once for all of them.

On a Linux CPU MLX compiles each kernel when it is first needed, some 500 in the whole suite; most
of the time goes into the one header that they all include.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

from nested_core import backend

HEADER = Path("mlx", "backend", "cpu", "compiled_preamble.h")
FLAGS = ("-std=c++17", "-O3", "-Wall", "-fPIC")  # MLX's: for others g++ reads the header again


def read_header_once(folder: Path) -> None:
    """Precompile the header into a new folder, where every g++ started from here on finds it.

    g++ searches the folders of CPLUS_INCLUDE_PATH in their order, and heeds no -I for one of them:
    MLX's own stands there behind the new one.
    """
    if sys.platform != "linux" or backend.device() != "cpu" or shutil.which("g++") is None:
        return
    include = Path(mx.__file__).with_name("include")
    precompiled = folder / HEADER.with_suffix(".h.gch")
    precompiled.parent.mkdir(parents=True)
    read = ["g++", *FLAGS, "-I", str(include), "-x", "c++-header", str(include / HEADER)]
    subprocess.run([*read, "-o", str(precompiled)], check=True, capture_output=True)
    os.environ["CPLUS_INCLUDE_PATH"] = os.pathsep.join([str(folder), str(include)])
