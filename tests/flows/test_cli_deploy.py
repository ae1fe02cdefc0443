"""`deploy` where there is nothing to deploy to."""

from __future__ import annotations

from collections.abc import Callable

from tests.flows.conftest import Ended


def test_without_a_server_deploy_exits_2_and_says_what_to_set(
    nested_tune: Callable[..., Ended],
) -> None:
    refused = nested_tune("deploy")
    assert refused.code == 2
    assert "PREFECT_API_URL is not set" in refused.message()


def test_a_server_that_does_not_answer_is_said_in_a_paragraph(
    nested_tune: Callable[..., Ended],
) -> None:
    nowhere = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    failed = nested_tune("deploy", **nowhere)
    assert failed.code == 1
    assert "Expected a Prefect server at PREFECT_API_URL" in failed.message()
