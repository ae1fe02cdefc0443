"""What the operating system refused, as a paragraph: where, what was expected, what to do."""

from __future__ import annotations

import errno
import os
import resource

from nested_core.errors import BEGIN_AGAIN, NO_SPACE_ERRNOS, Advice, ConfigError, NestedTuneError

NOT_ALLOWED_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_RESOURCES_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
# What is wrong with a path itself, by error: what to do about it.
ADVICE_BY_PATH_ERRNO = {
    errno.ENAMETOOLONG: "A name may have 255 bytes, a path some 4,000: give a shorter one",
    errno.ENOENT: "Give a path that exists, or make its folder first",
    errno.ENOTDIR: "A part of it is a file where a folder is needed: give another path",
    errno.EISDIR: "It is a folder, and a file is needed: give another path",
    errno.ELOOP: "Its links lead round in a circle, or are too many: give the path that they mean",
    errno.EEXIST: "Something is there already: give another path, or move it away",
    errno.ENOTEMPTY: "The folder is not empty: give another path, or move away what is in it",
    errno.EXDEV: "It crosses from one file system to another: give a path on one of them",
    errno.EINVAL: "It is nothing that can be read or written in this way: give a file or a folder",
    errno.EILSEQ: "This file system takes no such name: give a name in UTF-8",
    errno.ENXIO: "It is a device or a pipe without another end: give a file",
    errno.ENODEV: "It is a device that is not there: give a file",
    errno.ENOTSUP: "This file system does not do what is needed: give a path on another",
    errno.EBUSY: "Another program uses it: wait for that, or give another path",
    errno.ETXTBSY: "It is a program that runs: give another path",
}
RUN_GOES_ON = Advice(
    command="Give the command again; a run that has begun continues from its last checkpoint with "
    "its --run-dir and --resume.",
    page="Press Retry: a run that has begun continues from its last checkpoint.",
    python="Call it again; a run that has begun continues from its last checkpoint with "
    "open_run(PATH, resume=True).",
)
LONGEST_SHOWN_PATH = 1_000
OPEN_FILES_OF_MLX_LM = 4_096  # mlx_lm/utils.py


def explain(error: OSError) -> NestedTuneError:
    """The error in our own words: a ConfigError where another path or right is needed."""
    place, reason = _describe_path(error), error.strerror or str(error)
    if error.errno in NO_SPACE_ERRNOS:
        return NestedTuneError(
            f"{place} cannot be written ({reason}). What stood on the disk before is as it "
            f"was. Make room.",
            advice=RUN_GOES_ON,
        )
    if error.errno in NOT_ALLOWED_ERRNOS:
        return ConfigError(
            f"{place} cannot be read or written ({reason}). Check its owner, its "
            f"permissions and those of its folder, and how it is mounted, or give another path."
        )
    if error.errno in ADVICE_BY_PATH_ERRNO:
        return ConfigError(
            f"{place} cannot be used ({reason}). {ADVICE_BY_PATH_ERRNO[error.errno]}."
        )
    if error.errno in NO_RESOURCES_ERRNOS:
        return NestedTuneError(
            f"The system gave no more of what {place} needed ({reason}). End other programs, or "
            f"raise the limits of this one (`ulimit -n` for open files).",
            advice=BEGIN_AGAIN,
        )
    return NestedTuneError(
        f"{place} cannot be read or written ({reason}). That is the disk's, the network's or the "
        f"system's: look there.",
        advice=RUN_GOES_ON,
    )


def explain_file_limit(error: Exception) -> str | None:
    """The paragraph where mlx-lm could not set its limit of open files, as it does on import."""
    if "maximum limit" not in str(error):  # resource.setrlimit
        return None
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"This process may open {hard:,} files at a time, and mlx-lm asks for "
        f"{OPEN_FILES_OF_MLX_LM:,} when it is imported. Raise the hard limit "
        f"(`ulimit -Hn {OPEN_FILES_OF_MLX_LM}`, LimitNOFILE in a systemd unit, "
        f"/etc/security/limits.conf) and give the command again."
    )


def explain_missing_mlx(error: Exception) -> str | None:
    """The paragraph where MLX is not there, or without its library for this machine."""
    if not isinstance(error, ImportError):
        return None
    if (error.name or "").partition(".")[0] != "mlx" and "libmlx" not in str(error):
        return None
    return (
        f"MLX cannot be imported: {error}. On Linux it comes with an extra, one for each kind of "
        f"device: pip install 'nested-tune[cpu]' or 'nested-tune[cuda]', never both. On a Mac it "
        f"needs Apple silicon and macOS 14 or newer."
    )


def _describe_path(error: OSError) -> str:
    """The path that an error is about, the target of a copy, at most LONGEST_SHOWN_PATH long."""
    place = error.filename2 or error.filename
    if place is None or isinstance(place, int):
        return "a file or a connection"
    text = os.fsdecode(place)
    if len(text) <= LONGEST_SHOWN_PATH:
        return text
    return f"{text[:LONGEST_SHOWN_PATH]}... ({len(os.fsencode(text)):,} bytes)"
