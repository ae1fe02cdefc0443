"""What `doctor` asks the server."""

from __future__ import annotations

from prefect.settings import (
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)

from flows.rooms.deploy.server_checks import _check_database
from tests.flows.conftest import called
from tests.left_out import needs_rooms


def test_of_a_database_that_this_environment_does_not_name_nothing_is_said() -> None:
    here = {PREFECT_API_URL: "http://127.0.0.1:4200/api"}
    with temporary_settings(here, restore_defaults={PREFECT_API_DATABASE_CONNECTION_URL}):
        unknown = _check_database()
    with temporary_settings(here | {PREFECT_API_DATABASE_CONNECTION_URL: "sqlite+aiosqlite:///x"}):
        unfit = _check_database()
    assert (unknown.ok, unknown.seen.startswith("unknown here")) == (True, True)
    assert (unfit.ok, unfit.seen) == (False, "sqlite+aiosqlite")


@needs_rooms("doctor")
def test_doctor_says_of_a_server_that_does_not_answer_what_starts_it(tmp_path, monkeypatch) -> None:
    nowhere = "http://127.0.0.1:9/api"
    monkeypatch.setenv("PREFECT_API_URL", nowhere)
    with temporary_settings({PREFECT_API_URL: nowhere, PREFECT_CLIENT_MAX_RETRIES: 0}):
        done = called("doctor", "--json", cwd=tmp_path)
    (server,) = (each for each in done.document["checks"] if each["name"] == "server")
    assert (server["ok"], server["seen"].startswith(f"{nowhere} does not answer")) == (False, True)
    assert "prefect server start" in server["mend"]
