"""An adapter and what is exported of it, asked the same questions: `python -m
benchmarks.export_table ROWS.jsonl NAME ADAPTER --suite QUESTIONS --data HELD_OUT --folder DIR`.

Each export is a command of its own, whose processor seconds are counted; GGUFs are asked in
llama.cpp, the folder in mlx_lm. A row has the right answers of adapter and export, and the paired
95 % interval of the difference in percentage points. Appends a row an export; what the file has is
not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.commands import run_command

EXPORTS: dict[str, dict[str, str]] = {
    "fused": {"fused": "fused"},
    "f16": {"gguf": "f16.gguf"},
    "q8_0": {"gguf": "q8_0.gguf", "quantize": "q8_0"},
    "q4_k_m": {"gguf": "q4_k_m.gguf", "quantize": "q4_k_m"},
    "LoRA on f16": {"gguf_adapter": "lora.gguf", "base_gguf": "base-f16.gguf"},
    "LoRA on q4_k_m": {
        "gguf_adapter": "lora-4.gguf",
        "base_gguf": "base-q4_k_m.gguf",
        "quantize": "q4_k_m",
    },
}
PLACES = ("fused", "gguf", "gguf_adapter", "base_gguf")


def export_noting_answers(given: dict[str, Any]) -> None:
    """Export, in this process, and write which questions adapter and export answer right."""
    from nested_core.backend import prepare

    prepare()  # before mlx is imported: it finds the BLAS of all processes
    from nested_core import export
    from nested_core.errors import GateRejected
    from nested_core.gate.checks.tasks import score_answers
    from nested_core.rooms.export import judgement
    from nested_core.rooms.export.export_record import read_export_record

    count, right = judgement.count_right_answers, list[list[float]]()

    def counting(suites: Sequence[Any], *answers: Any) -> Any:
        for own in answers:
            records = [score_answers(one, "candidate", own[one.suite.name], 0.0) for one in suites]
            right.append([record.score for each in records for record in each])
        return count(suites, *answers)

    judgement.count_right_answers = counting
    place = Path(given.get("fused") or given.get("gguf") or given["gguf_adapter"])
    try:
        export(**given["options"] | {key: given[key] for key in PLACES if key in given})
    except GateRejected:
        place = place.with_name(f"{place.stem}.rejected{place.suffix}")
    record = read_export_record(place)
    assert record is not None  # noqa: S101
    files = [place / name if place.is_dir() else place for name in record.files]
    row = {"right": right, "bytes": sum(file.stat().st_size for file in files)}
    row |= {"stands": record.stands, "summary": record.describe(), "notes": record.notes}
    row |= {"reader": record.reader, "problems": record.problems}
    Path(given["answer"]).write_text(json.dumps(row))


def measure(name: str, kind: str, adapter: str, options: dict[str, Any], folder: Path) -> Any:
    """Return the row of one export, which a new process makes."""
    settings = EXPORTS[kind]
    given: dict[str, Any] = {key: str(folder / settings[key]) for key in PLACES if key in settings}
    options = {"what": adapter, "quantize": settings.get("quantize", "f16")} | options
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        given |= {"options": options, "answer": answer.name}
        words = ["-m", "benchmarks.export_table", "--export", json.dumps(given)]
        run = run_command(words, os.environ)
        if run["code"]:
            raise SystemExit("\n".join(line for _, line in run["lines"][-20:]))
        row = json.loads(Path(answer.name).read_text())
    before, after = (np.array(each) for each in row.pop("right"))
    points = 100 * (after - before)
    half = 1.96 * points.std(ddof=1) / len(points) ** 0.5
    row |= {"name": name, "kind": kind, "questions": len(points)}
    row |= {"right_adapter": float(before.sum()), "right": float(after.sum())}
    row |= {"interval": [round(points.mean() - half, 2), round(points.mean() + half, 2)]}
    return row | {"cpu_seconds": run["cpu_seconds"], "seconds": run["seconds"]}


def main() -> None:
    """Measure the exports that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--export", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("rows", type=Path, nargs="?", metavar="ROWS.jsonl")
    parser.add_argument("name", nargs="?")
    parser.add_argument("adapter", nargs="?")
    parser.add_argument("--suite", help="questions, scored by exact")
    parser.add_argument("--data", help="held-out rows")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--kinds", nargs="+", choices=EXPORTS, default=EXPORTS)
    given = parser.parse_args()
    if given.export is not None:
        export_noting_answers(given.export)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    suite = {"name": "questions", "file": given.suite, "score": "exact"}
    suite["max_tokens"] = given.max_tokens
    options = {"suites": [suite], "data": given.data}
    lines = given.rows.read_text().splitlines() if given.rows.exists() else []
    known = {(row["name"], row["kind"]) for row in map(json.loads, lines)}
    for kind in (kind for kind in given.kinds if (given.name, kind) not in known):
        row = measure(given.name, kind, given.adapter, options, given.folder)
        with given.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
