"""The gate's page beside a flow run: the verdict, and what was answered to each suite."""

from __future__ import annotations

from tasks.gate import describe_verdict

TASK = {
    "name": "capitals",
    "questions": 15,
    "base": 0.0,
    "parent": None,
    "champion": None,
    "candidate": 14 / 15,
    "difference": 14 / 15,
    "interval": [0.8, 1.0],
    "verdict": "passed",
}
VERDICT = {
    "verdict": "passed",
    "reasons": [],
    "adapter_step": 8,
    "tensors": [],
    "tiers": [],
    "champion": None,
    "drift": None,
}


def test_each_suite_is_a_row_of_the_page() -> None:
    page = str(describe_verdict(VERDICT | {"validation": None, "tasks": [TASK]}))
    row = "| capitals | 15 | 0 | none | none | 0.9333 | +0.933 | +0.800 to +1.000 | passed |"
    assert row in page.replace("\\", "")


def test_a_verdict_without_suites_has_no_table_of_them() -> None:
    assert "suite" not in str(describe_verdict(VERDICT | {"validation": None, "tasks": []}))


def test_the_drift_is_a_sentence_with_the_base_where_it_was_measured() -> None:
    drift = {"kl_initial": 0.5, "kl_base": 0.75, "tokens": 840}
    page = str(describe_verdict(VERDICT | {"validation": None, "tasks": [], "drift": drift}))
    assert (
        "The predictions moved by 0.5 nats a token from those of the adapter that training began "
        "from, and by 0.75 from the base model's"
    ) in page.replace("\\", "")
