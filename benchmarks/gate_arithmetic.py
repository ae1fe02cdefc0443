"""The gate's arithmetic on 10,000 held-out examples and 30 suites of 200, without a model.

    python -m benchmarks.gate_arithmetic

Losses of 24 evaluated steps and of a champion, and the answers of four models, are planted; the
gate's own code compares, corrects for the choice, looks for harm, writes what it writes, and judges
the suites. It ends with exit code 1 above a minute or a gigabyte.
"""

from __future__ import annotations

import os
import resource
import sys
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")  # before numpy

import numpy as np

from benchmarks.gate_rates import BOUNDS, draw_suites, plant_best_step
from nested_core.measure.answers.answer_bounds import judge_answers
from nested_core.measure.losses.loss_figures import (
    harm_reasons,
    loss_reasons,
    summarise_champion,
    summarise_losses,
)

EXAMPLES = 10_000
SUITES = 30
MOST_SECONDS = 60
MOST_BYTES = 1_000_000_000


def main() -> int:
    """Judge once; print wall and processor seconds, and the most memory resident."""
    random = np.random.default_rng(0)
    losses, candidates = plant_best_step(random, examples=EXAMPLES, distribution="normal", sd=0.2)
    gate, records = draw_suites(random, SUITES)
    began, used = time.perf_counter(), time.process_time()
    validation = summarise_losses(
        losses, selected_on_same_data=True, bounds=BOUNDS, candidates=candidates
    )
    reasons = loss_reasons(validation, BOUNDS) + harm_reasons(losses, validation, BOUNDS)
    champion = summarise_champion("champion", losses, BOUNDS, candidates)
    losses.render()
    middle = time.perf_counter()
    results, more = judge_answers(gate, records)
    ended = time.perf_counter()
    if len(results) != SUITES or champion.corrected_interval is None:
        raise SystemExit("The gate has not compared what was planted.")
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(
        f"gate_arithmetic: {EXAMPLES:,} examples in {middle - began:.1f} s, {SUITES} suites in "
        f"{ended - middle:.1f} s ({time.process_time() - used:.1f} s of a processor), "
        f"{resident / 1e6:.0f} MB resident; {len(reasons + more)} reasons"
    )
    return 0 if ended - began <= MOST_SECONDS and resident <= MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
