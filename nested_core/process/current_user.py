"""Who runs this process."""

import getpass
import os


def current_user() -> str:
    """The login name, or `uid N` where the system knows none, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such entry in passwd: KeyError until Python 3.12
        return f"uid {os.getuid()}"
