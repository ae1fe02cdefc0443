"""How the failures of preferences.toml are planted, and their healthy twins made.

The rows are those of the room's own tests, and so is the code that is broken; the tests plant the
same in one process.
"""

from __future__ import annotations

from benchmarks.silent_failures.cases import Case
from benchmarks.silent_failures.plants import TRAINING, by_name
from tests.rooms.preferences.pair_data import list_pairs, list_swapped_pairs

TOO_SHORT = 39  # tokens: each of these pairs has more


def pairs_case(case: Case, loss: str = "dpo") -> None:
    """Pairs about capitals, of which a short answer is the chosen one, and a short training."""
    case.write_base()
    case.write_rows(list_pairs("train"), list_pairs("valid"))
    case.settings.loss = loss
    case.settings.iters = 6
    case.settings.rate = 3e-4
    case.settings.max_seq_length = 256
    case.steps = TRAINING


def pairs_swapped(case: Case, planted: bool) -> None:
    pairs_case(case)
    if planted:
        case.write_rows(list_swapped_pairs("train"), list_pairs("valid"))


def reference_is_the_trained_model(case: Case, planted: bool) -> None:
    def set_aside(case: Case) -> None:
        (case.folder / "run").rename(case.folder / "first-run")

    def take_it_for_the_reference(case: Case) -> None:
        set_aside(case)
        case.break_library("reference-is-the-trained-model")
        case.environment["TRAINED_ADAPTER"] = "first-run/adapter"

    pairs_case(case)
    case.steps = ["train", take_it_for_the_reference if planted else set_aside, *TRAINING]


def chosen_cut_off(case: Case, planted: bool) -> None:
    pairs_case(case)
    if planted:
        case.settings.max_seq_length = TOO_SHORT


def mask_on_the_prompt(case: Case, planted: bool) -> None:
    pairs_case(case, "simpo")
    case.settings.beta = 2.0
    # A cache of its own: tokens are cached by the rows, and both folders have the same rows.
    case.environment["NESTED_TUNE_CACHE"] = str(case.folder / "cache")
    if planted:
        case.break_library("mask-on-the-prompt")


def beta_zero(case: Case, planted: bool) -> None:
    pairs_case(case)
    if planted:
        case.settings.beta = 0.0


PLANTS = by_name(
    pairs_swapped, reference_is_the_trained_model, chosen_cut_off, mask_on_the_prompt, beta_zero
)
