"""The control of shapes: what the champion's training answers had, and these lack.

Shapes of answers, labels and the number of rows are kept in gate.json, and compared with those of
the champion. How rows differ from each other is told with the data (rooms/suspect_rows).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nested_core.gate.checks.judged import CheckedRun
from nested_core.gate.evidence.champion_adapter import Champion
from nested_core.records.verdict import CheckRow
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry.versions import version_folder
from nested_core.rooms.controls.answer_rows import NO_ANSWERS, Rows, RunRows
from nested_core.rooms.controls.results import ControlWarning, Told
from nested_core.storage.atomic import digest_answer
from nested_core.text.words import find_gone, fold_shape, is_given_away

NAME = "shapes of answers"
MAX_ROWS = 2_000
KEPT, MIN_KEPT = 200, 5  # shapes and labels in gate.json; of how many rows each is
PROFILE_BLOCK, LABELS = "answer_shapes", "label_digests"  # of gate.json, which has no text of a row
MIN_SHARE_LEFT = 1 / 5  # of the champion's rows: nights whose sizes spread by half differ by less


def measure_shapes(run: RunRows) -> Told:
    """Count the shapes and labels of the training answers, and compare them with the champion's."""
    known = run.read_train(MAX_ROWS, 0)
    if is_given_away((row.asked, row.given) for row in known):
        told = f"{NAME}, most of them in their prompts"
        yield CheckRow(told, verdict="a task of finding them, or given away")
    profile = profile_answers(len(run.train), [row.given for row in known])
    warnings = [*_compare_with_champion(run.judged, profile, run.read_held_out(MAX_ROWS))]
    kept = {
        name: {one: count for one, count in profile[name].most_common(KEPT) if count >= MIN_KEPT}
        for name in ("shapes", LABELS)
    }
    blocks = run.judged.verdict.blocks | {PROFILE_BLOCK: profile | kept}
    run.judged.verdict = replace(run.judged.verdict, blocks=blocks)
    healthy = "passed" if known else f"not applicable: {NO_ANSWERS}"
    kinds = ", ".join(one.kind.replace("_", " ") for one in warnings) or healthy
    yield CheckRow(NAME, after=f"{len(known):,} answers", verdict=kinds)
    yield from warnings


def profile_answers(rows: int, answers: Sequence[str]) -> dict[str, Any]:
    """Count answers by their shapes and by digests of their texts, of so many rows.

    A text that comes once is no label: among many such texts one has the 12 bits of each label.
    """
    texts = Counter(answers)
    labels = Counter(digest_answer(text) for text in answers if texts[text] > 1)
    shapes = Counter(map(fold_shape, answers))
    return {"rows": rows, "answers": len(answers), "shapes": shapes, LABELS: labels}


def _compare_with_champion(
    judged: CheckedRun, profile: Mapping[str, Any], held_out: Rows
) -> Iterator[ControlWarning]:
    """Warn of rows, shapes and labels that the champion's training rows had, and these lack."""
    location, champion = judged.config.registry.location, judged.champion
    if location is None or not isinstance(champion, Champion):
        return
    folder = version_folder(*location, champion.version)
    last = read_verdict(folder / GATE_NAME).blocks.get(PROFILE_BLOCK)
    # A night that replays trains on more rows than its own
    if last is None or LABELS not in last or judged.run.replay.exists():
        return
    rows, before = profile["rows"], last["rows"]
    if rows < MIN_SHARE_LEFT * before:
        yield ControlWarning.told("few_rows", rows / before, rows=rows, last=before)
    share = profile["answers"] / max(1, last["answers"])
    shapes, labels = (find_gone(last[x], profile[x], share) for x in ("shapes", LABELS))
    if 2 * sum(last["shapes"][one] for one in shapes) > last["answers"]:
        return  # it is another task
    if shapes:
        what, count = f"no training answer has the shape {shapes[0]!r}", last["shapes"][shapes[0]]
        yield ControlWarning.told("answers_gone", None, what=what, last=count)
    elif labels:  # their texts are in no registry: held-out rows may have them
        texts = Counter(x.given for x in held_out if digest_answer(x.given) == labels[0])
        usual = {text for text, _ in texts.most_common(1)}
        lines = [row.tell(row.given) for row in held_out if row.given in usual]
        what, count = "at most one training row has an answer", last[LABELS][labels[0]]
        yield ControlWarning.told("answers_gone", None, lines, what=what, last=count)
