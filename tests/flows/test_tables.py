"""Tables on a terminal: cells are broken between words, and names are not broken."""

from __future__ import annotations

import pytest

from flows.terminal.console import print_table

LONG = "passed, inconclusive: +0.01 nats/token; some 4,000 examples would settle it"


@pytest.mark.parametrize("columns", ["60", "80"])
def test_no_word_is_broken_where_all_fit(columns, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    names = ("", "first", "second")
    print_table(names, [("lora_parameters.rank", "8", "16"), ("verdict", LONG, "task_below")])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= int(columns)
    assert "lora_parameters.rank" in printed
    assert "task_below" in printed
    rows = [line.split("│") for line in printed.splitlines() if "│" in line]
    assert " ".join(cells[2].strip() for cells in rows[1:]) == LONG


def test_the_longest_word_is_broken_where_the_terminal_is_too_narrow(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    print_table(("key", "value"), [("a" * 40, "task_below")])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 30
    assert "task_below" in printed
