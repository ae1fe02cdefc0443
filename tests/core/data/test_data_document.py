"""docs/data.md names every check that there is, and none that there is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nested_core.data.rules.file_rules import FILE_RULES, ROW_COUNT_RULES
from nested_core.data.rules.line_rules import LINE_RULES, make_held_out_rules
from nested_core.data.rules.rule_table import FrameRules
from nested_core.data.rules.token_rules import ENCODING_RULES, TOKEN_RULES
from nested_core.records.dataset import DATA_GUIDE, Finding, guide_sentence
from nested_core.seams import is_there

ROOT = Path(__file__).parents[3]
DATA = ROOT / "nested_core" / "data"
SECRETS = ROOT / "nested_core" / "rooms" / "secrets"
OF_SECRETS = {"likely-secret", "personal-data"}
SUSPECT_ROWS = ROOT / "nested_core" / "rooms" / "suspect_rows"
OF_SUSPECT_ROWS = {
    *("mojibake", "encoded-answers", "two-answers", "cut-off-answers", "exchanged-columns"),
    *(
        "lost-character",
        "case-lost",
        "tokens-alike",
        "handwritten-turns",
        "date-in-prompt",
        "two-templates",
    ),
    *("serialised-turns", "splits-differ", "odd-blanks"),
    *("answers-repeat-prompts", "labels-in-two-spellings"),
    "missing-values",
    "answers-moved",
    "answer-repeats-question",
    "goes-on",
    "context-lost",
    "another-language",
    "zeros-lost",
    "one-length",
    "prompts-of-one-length",
    "shape-of-train-alone",
}
TABLES_ROOM = ROOT / "nested_core" / "rooms" / "tables"
HOUSEKEEPING = ROOT / "nested_core" / "rooms" / "housekeeping"
PREFERENCES = ROOT / "nested_core" / "rooms" / "preferences"
OF_PREFERENCES = {
    *("equal-answers", "swapped-pair", "swapped-label", "one-label"),
    *("empty-answer", "no-answer", "other-prompt", "length-tells-choice", "few-of-a-label"),
}
# Where a check that no rule makes gets its name: a problem's, or what a function of names returns.
NAMED = re.compile(
    r'(?:LineProblem\(|return |else |return b"", \(|= \()"([a-z0-9]+(?:-[a-z0-9]+)+)"'
)
TABLES = (
    LINE_RULES,
    make_held_out_rules("error"),
    FILE_RULES,
    ROW_COUNT_RULES,
    ENCODING_RULES,
    TOKEN_RULES,
)


def documented_checks() -> set[str]:
    text = (ROOT / DATA_GUIDE).read_text(encoding="utf-8")
    anchors = re.findall(r'<a id="([a-z0-9-]+)"></a>`([a-z0-9-]+)`', text)
    assert [pair for pair in anchors if pair[0] != pair[1]] == []
    assert len(set(anchors)) == len(anchors)
    return {name for _, name in anchors}


def test_every_check_is_documented() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in DATA.rglob("*.py"))
    rules = {rule.name for table in TABLES for rule in table.rules} - {"{check}"}
    documented = documented_checks() - (set() if is_there("secrets") else OF_SECRETS)
    documented -= set() if is_there("suspect_rows") else OF_SUSPECT_ROWS
    documented -= set() if is_there("preferences") else OF_PREFERENCES
    documented -= set() if is_there("tables") else {"cell-count"}
    documented -= set() if is_there("housekeeping") else {"no-question"}
    for room in (SECRETS, SUSPECT_ROWS, PREFERENCES, TABLES_ROOM, HOUSEKEEPING):
        code += "".join(path.read_text(encoding="utf-8") for path in room.rglob("*.py"))
    assert len(documented) > 40
    infos = {name for name in documented if name.startswith("dropped-")}  # by reason
    reasons = {name.removeprefix("dropped-") for name in infos}
    assert reasons == {"duplicate", "leakage", "overlong", "held-out-before"}
    assert {name for name in documented - infos if f'"{name}"' not in code} == set()
    assert {*NAMED.findall(code), *rules} - documented == set()


def test_a_message_names_the_places_of_its_first_checks() -> None:
    checks = ("leakage", "leakage", "bad-json", "not-utf8", "overlong")
    findings = [Finding("train.jsonl", 1, "error", check, "why") for check in checks]
    assert guide_sentence(findings[:2]) == "Explained in the project's docs/data.md#leakage"
    assert guide_sentence(findings) == (
        "Explained in the project's docs/data.md#leakage, docs/data.md#bad-json, "
        "docs/data.md#not-utf8, ..."
    )


def test_most_checks_are_expressions_in_a_pandera_schema() -> None:
    assert all(len(table.make_schema.checks) == 1 for table in TABLES)
    in_schemas = {rule.name for table in TABLES for rule in table.rules}
    assert len(in_schemas & documented_checks()) >= 28


@pytest.mark.parametrize("table", TABLES)
def test_a_table_declares_the_columns_that_its_rules_read(table: FrameRules) -> None:
    read = {name for rule in table.rules for name in rule.columns}
    assert read <= set(table.columns)
