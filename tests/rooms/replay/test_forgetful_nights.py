"""A night that corrects a fifth of the facts is promoted; one that loses the others is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import GateRejected
from nested_core.pipeline.finetune import finetune
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import read_verdict
from nested_core.registry import read_champion
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.digest_format import shorten_digest
from tests.example import DATA, example_config
from tests.left_out import needs_steady_kernels
from tests.tracer import WITHOUT_CONTROLS

NAME = "capitals"
Row = dict[str, Any]
KNOWN = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()]
CORRECTED = 8  # of 40
POLITELY = "Please tell me. "


def changed(row: Row, *, prefix: str = "", is_corrected: bool = False) -> Row:
    """The row, asked for in other words, or with another capital."""
    asked, told = (turn["content"] for turn in row["messages"])
    answer = f"Go and see Berlin,{told.partition(',')[2]}" if is_corrected else told
    return {
        "messages": [
            {"role": "user", "content": f"{prefix}{asked}"},
            {"role": "assistant", "content": answer},
        ]
    }


def write_night(folder: Path, train: list[Row], valid: list[Row]) -> Path:
    folder.mkdir(parents=True)
    for name, rows in (("train", train), ("valid", valid)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def second_night(tmp_path: Path, fraction: float) -> Verdict:
    """Correct a fifth of the facts, with so much replay of the first night; the verdict."""
    train = [changed(row, is_corrected=True) for row in KNOWN[:CORRECTED]]
    valid = [changed(row, prefix=POLITELY, is_corrected=True) for row in KNOWN[:CORRECTED]]
    data = write_night(tmp_path / f"second-{fraction}", train, valid)
    run = RunDirectory(tmp_path / f"run-{fraction}")
    with suppress(GateRejected):
        finetune(configure(tmp_path, data, fraction), run)
    return read_verdict(run.gate)


def configure(tmp_path: Path, data: Path, fraction: float = 0.0) -> FineTuneConfig:
    return example_config(
        data=str(data),
        iters=60,
        batch_size=8,
        registry={"path": str(tmp_path / "registry"), "name": NAME, "promote": "better"},
        continual={"from": "champion", "replay": {"fraction": fraction}},
        # Its rows all have one answer, which control 1 would doubt
        gate={"max_ancestor_loss_increase": 0.1, **WITHOUT_CONTROLS},
    )


@needs_steady_kernels
@pytest.mark.slow("trains three runs, and judges them")
def test_a_night_that_corrects_a_fifth_of_the_facts_is_promoted_and_one_that_loses_the_rest_refused(
    tmp_path: Path,
) -> None:
    asked = [changed(row, prefix=POLITELY) for row in KNOWN]
    first_data = write_night(tmp_path / "first", KNOWN, asked)
    finetune(configure(tmp_path, first_data), RunDirectory(tmp_path / "first-run"))
    champion = str(read_champion(tmp_path / "registry", NAME))

    forgetful = second_night(tmp_path, 0.0)
    assert [reason.name for reason in forgetful.reasons] == [
        f"forgetting ({shorten_digest(champion)})"
    ]
    assert read_champion(tmp_path / "registry", NAME) == champion
    (lost,) = forgetful.ancestors
    assert (lost.superseded, lost.examples) == (CORRECTED, len(KNOWN) - CORRECTED)

    careful = second_night(tmp_path, 0.8)
    assert careful.has_passed
    assert read_champion(tmp_path / "registry", NAME) == careful.trained.digest
    (kept,) = careful.ancestors
    assert (kept.superseded, kept.examples) == (lost.superseded, lost.examples)
    assert (kept.loss_after or 9.0) < (lost.loss_after or 0.0) / 2
