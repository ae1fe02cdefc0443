"""A row passes no more files from its file to the loss, and a verdict none in `judge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import pytest

from nested_core.errors import list_first, shorten
from nested_core.text.duration_format import format_duration
from tests.tracer import holds, trace_a_row, trace_a_verdict, tracing

# Upper bounds: whoever makes a way shorter lowers them.
FILES_OF_A_ROW = 17
OF_DATA_AND_TRAINING = 11  # of these; the others look at the row and hand it to no loss
FILES_OF_A_VERDICT = 13


@dataclass
class Box:
    content: object


def is_marked(value: object) -> bool:
    return isinstance(value, str) and "marked" in value


def test_a_file_is_entered_by_a_call_with_the_value_or_by_its_return_in_any_thread() -> None:
    with tracing(is_marked) as entered:
        format_duration(1.0)
        list_first(["another text"], 1)
        assert entered == []
        thread = Thread(target=shorten, args=("a marked text",))
        thread.start()
        thread.join()
        assert entered == ["errors.py"]
        entered.clear()
        list_first(["another text", "a marked text"], 1)
        assert entered == ["errors.py"]
        entered.clear()
    shorten("a marked text, after the block")
    assert entered == []


@pytest.mark.parametrize("value", [["marked"], {"key": ("marked",)}, Box({"key": Box("marked")})])
def test_a_value_is_held_by_what_holds_it(value: object) -> None:
    assert holds(value, is_marked)
    assert not holds(value, is_marked, depth=0)
    assert not holds([Box("another"), 1, None], is_marked)


@pytest.mark.usefixtures("own_random_state")
@pytest.mark.slow("trains without compiled steps")
def test_a_row_passes_no_more_files_than_it_did(tmp_path: Path) -> None:
    entered = trace_a_row(tmp_path / "run")
    packages = [file.split("/")[0] for file in entered]
    assert {"data/lines/line_table.py", "training/loss/cross_entropy.py"} <= set(entered)
    assert len(entered) <= FILES_OF_A_ROW, entered
    assert packages.count("data") + packages.count("training") <= OF_DATA_AND_TRAINING, entered


@pytest.mark.slow("trains a run and judges it")
def test_a_verdict_enters_no_more_files_than_it_did(tmp_path: Path) -> None:
    entered = trace_a_verdict(tmp_path / "run")
    assert {"gate/checks/judged.py", "records/verdict_file.py"} <= set(entered)
    assert len(entered) <= FILES_OF_A_VERDICT, entered
