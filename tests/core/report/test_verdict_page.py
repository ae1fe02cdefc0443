"""The gate's page beside a flow run: the verdict, and what was answered to each suite."""

from __future__ import annotations

from nested_core.report.verdict_page import describe_suites, describe_verdict
from tests.core.report.verdicts import SUITE, make_verdict


def test_each_suite_is_a_row_of_the_page() -> None:
    page = str(describe_verdict(make_verdict(tasks=[SUITE])))
    row = "| capitals | 15 | 0 | - | - | 0.9333 | +0.933 | +0.800 to +1.000 | passed |"
    assert row in page.replace("\\", "")


def test_a_verdict_without_suites_has_no_table_of_them() -> None:
    assert "suite" not in str(describe_verdict(make_verdict()))


def test_a_suite_says_how_many_were_right_and_whether_it_failed() -> None:
    text = (
        "capitals: 3 of 15 right before, 14 of 15 after "
        "(difference +0.933, 95 % interval +0.800 to +1.000), champion 15 of 15"
    )
    suite = SUITE | {"parent": 0.2, "champion": 1.0}
    assert describe_suites(make_verdict(tasks=[suite])) == text
    failed = describe_suites(make_verdict(tasks=[suite, suite | {"verdict": "failed"}]))
    assert failed == f"{text}; {text} (failed)"


def test_the_drift_is_a_sentence_with_the_base_where_it_was_measured() -> None:
    drift = {"kl_initial": 0.5, "kl_base": 0.75, "tokens": 840}
    page = str(describe_verdict(make_verdict(drift=drift)))
    assert (
        "The predictions moved by 0.5 nats a token from those of the adapter that training began "
        "from, and by 0.75 from the base model's"
    ) in page.replace("\\", "")
