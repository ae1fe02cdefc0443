"""How far right exports are from their adapter, and whether any is refused.

    python -m benchmarks.export_bounds ROWS.jsonl [--seeds 5]

Small random bases of llama, qwen2, qwen3 and gemma3, each with an adapter that was trained on the
example's rows, exported in every format; GGUFs are read by llama.cpp where it is installed. Appends
a line an export, goes on where an earlier go ended, and prints the largest distance of each format.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nested_core.backend import prepare

prepare()

import mlx.core as mx  # noqa: E402

from nested_core.errors import GateRejected  # noqa: E402
from nested_core.rooms.export.export_record import read_export_record  # noqa: E402
from nested_core.rooms.export.exporting import export  # noqa: E402
from tests.example import DATA  # noqa: E402
from tests.rooms.export.small_bases import FAMILIES, make_base, train_adapter  # noqa: E402

BASES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float32": {"dtype": mx.float32},
    "4-bit": {"bits": 4},
}
EXPORTS: dict[str, list[dict[str, Any]]] = {
    "bfloat16": [{"fused": "fused"}, {"gguf": "f16"}, {"gguf": "q8_0", "quantize": "q8_0"}],
    "float32": [{"fused": "fused"}],
    "4-bit": [{"fused": "fused"}],
}


def measure(family: str, seed: int, stored: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The figures of each export of an adapter of one base."""
    base = make_base(folder / "base", family, seed=seed, **BASES[stored])
    adapter = train_adapter(base, folder / "adapter", seed=seed)
    rows = folder / "rows.jsonl"  # 50, as those of ten alone leave wide intervals
    rows.write_text("".join((DATA / f"{split}.jsonl").read_text() for split in ("train", "valid")))
    for asked in EXPORTS[stored]:
        place = {"fused": folder / "fused", "gguf": folder / f"{asked.get('gguf')}.gguf"}
        target = {key: place.get(key, value) for key, value in asked.items()}
        artefact = next(value for value in target.values() if isinstance(value, Path))
        try:
            export(adapter, data=rows, **target)
        except GateRejected:
            artefact = artefact.with_name(f"{artefact.stem}.rejected{artefact.suffix}")
        record = read_export_record(artefact)
        assert record is not None and record.gain is not None  # noqa: S101, PT018
        yield {
            "family": family,
            "seed": seed,
            "base": stored,
            "weights": record.weights,
            "reader": record.reader,
            "distance": record.logits.distance,
            "carried": record.logits.carried,
            "gain": record.gain.base - record.gain.adapter,
            "kept": record.gain.share,
            "lost": record.gain.exported - record.gain.adapter,
            "problems": record.problems,
        }


def main() -> None:
    """Measure what is missing in the file, and print a line a format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    logging.getLogger("gguf").setLevel(logging.ERROR)
    rows = []
    if arguments.rows.exists():
        rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    known = {(row["family"], row["seed"], row["base"]) for row in rows}
    wanted = [(f, s, b) for s in range(arguments.seeds) for f in FAMILIES for b in BASES]
    for family, seed, stored in wanted:
        if (family, seed, stored) in known:
            continue
        with tempfile.TemporaryDirectory() as folder, arguments.rows.open("a") as file:
            for row in measure(family, seed, stored, Path(folder)):
                rows.append(row)
                file.write(json.dumps(row) + "\n")
    for weights in dict.fromkeys(row["weights"] for row in rows):
        own = [row for row in rows if row["weights"] == weights]
        refused = sum(bool(row["problems"]) for row in own)
        carried = [row["carried"] for row in own]
        print(
            f"{weights}: {len(own)} exports, {refused} refused; distance at most "
            f"{max(row['distance'] for row in own):.2g}, carried {min(carried):.3f} to "
            f"{max(carried):.3f}, kept at least {min(row['kept'] for row in own):.3f}, lost at "
            f"most {max(row['lost'] for row in own):.3g} nats/token"
        )


if __name__ == "__main__":
    main()
