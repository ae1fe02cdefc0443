"""The user who runs this process."""

import getpass
import os


def current_user() -> str:
    """Return the login name, or `uid N` if the system has no name for it, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such entry in passwd: KeyError until Python 3.12
        return f"uid {os.getuid()}"
