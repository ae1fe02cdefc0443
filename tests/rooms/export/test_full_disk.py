"""A full disk while the weights of an exported model are written."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

# A file may have so few bytes that writing fails as on a full disk.
WRITING = """
import resource, sys
from pathlib import Path
from nested_core import prepare

prepare()
import mlx.nn as nn
from nested_core.rooms.export.fusing import write_model_folder

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
try:
    write_model_folder(folder, folder, nn.Linear(64, 64), {})
except OSError as error:
    print(error.errno, error.filename)
"""


def test_a_folder_of_a_fused_model_that_cannot_be_written_is_a_full_disk(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRITING, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert done.stdout == f"{errno.ENOSPC} {tmp_path}\n"
