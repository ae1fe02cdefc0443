"""Who a change is signed with, where the system knows no name."""

from __future__ import annotations

import os
import pwd

import pytest

from nested_core.process.current_user import current_user


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_without_an_entry_in_passwd_a_change_is_signed_with_the_number_of_the_user(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Python 3.11 and 3.12 raise KeyError, 3.13 OSError."""

    def unknown(uid: int) -> None:
        raise error(f"uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert current_user() == f"uid {os.getuid()}"
