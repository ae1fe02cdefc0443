"""The user's own TMPDIR, for child processes of one whose TMPDIR is a folder of MLX's kernels."""

from __future__ import annotations

import os

KERNELS_FOLDER_VARIABLE = "NESTED_TUNE_KERNELS"
# The TMPDIR that the user had, for child processes: theirs is the kernel folder of their parent.
USER_TMPDIR_VARIABLE = "NESTED_TUNE_TMPDIR"


def environment_with_user_tmpdir() -> dict[str, str]:
    """Return this process's environment with the TMPDIR that it was started with.

    For child processes that do not use MLX, or that call `prepare` themselves.
    """
    outer = os.environ.get(USER_TMPDIR_VARIABLE)
    return dict(os.environ) if outer is None else os.environ | {"TMPDIR": outer}
