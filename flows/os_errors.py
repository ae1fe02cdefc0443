"""What the operating system refused, as a paragraph: where, what was expected, what to do."""

from __future__ import annotations

import errno

from nested_core.errors import ConfigError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


def explain(error: OSError) -> tuple[str, int] | None:
    """The paragraph and the exit code; None of what a person has no part in."""
    place = error.filename2 or error.filename or "a file"
    if error.errno in NO_SPACE:
        return (
            f"{place} cannot be written ({error.strerror}). What stood on the disk before is as it "
            f"was. Make room and give the command again; a run that has begun goes on from its "
            f"last checkpoint with its --run-dir and --resume."
        ), 1
    if error.errno in NOT_ALLOWED:
        return (
            f"{place} cannot be read or written ({error.strerror}). Check its owner, its "
            f"permissions and those of its folder, and how it is mounted, or give another path."
        ), ConfigError.exit_code
    return None
