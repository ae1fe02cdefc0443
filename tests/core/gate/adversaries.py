"""Runs that look trained and are not, and honest ones: a table of what the gate must say of each.

Each is made of a finished run of eight steps on tiers [1, 2, 4], whose initial adapter is fresh:
lora_a at random, lora_b zero. The pairs of bare adapters are in test_gate_pairs.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core.config.schema import FineTuneConfig
from nested_core.seams import is_there
from nested_core.storage.adapter import WEIGHTS_NAME, files_sha256, read_adapter
from nested_core.storage.checkpoint_verification import checkpoint_path
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays
from tests.builders.adapter_folders import Arrays, base_copy, change_config
from tests.builders.candidates import Candidate, shifted, turned_around
from tests.builders.data_sets import write_lines
from tests.builders.suites import KNOWN, task

DAMAGED = "damaged"  # no verdict at all: exit 6
STEP = 8


@dataclass(frozen=True)
class Scene(Candidate):
    """A copy of the finished run to spoil, and another run of the same kind."""

    other: RunDirectory

    def leave_out(self, names: list[str]) -> None:
        """Offer an adapter in which these tensors are as training found them."""
        self.offer({name: self.initial[name] for name in names})

    def change_one(
        self, name: str, change: Callable[[mx.array], mx.array], *, keeps_logits: bool = True
    ) -> None:
        """Offer an adapter with one tensor changed."""
        self.offer({name: change(self.trained[name])}, keeps_logits=keeps_logits)


Build = Callable[[Scene], FineTuneConfig | None]


@dataclass(frozen=True)
class Case:
    """A run to judge: how it is made, and the reason codes expected, none for one that passes.

    `build` returns the configuration to judge with where that is another than the run's.
    """

    name: str
    build: Build
    expected: tuple[str, ...]
    says: str | None = None


CASES: list[Case] = []


def case(*expected: str, says: str | None = None) -> Callable[[Build], Build]:
    """Enter a builder into the table, under its name; `says` is what it has to be called."""

    def enter(build: Build) -> Build:
        CASES.append(Case(build.__name__, build, expected, says))
        return build

    return enter


def leafwise(tensors: Arrays, **changes: Callable[[mx.array], mx.array]) -> Arrays:
    """The tensors with each lora_a or lora_b changed, as `a=` or `b=` says."""
    return {n: changes[n[-1]](v) if n[-1] in changes else v for n, v in tensors.items()}


def zeroed(*endings: str) -> Callable[[Arrays], None]:
    """Zeros for all tensors whose names end so."""

    def change(tensors: Arrays) -> None:
        for name in [name for name in tensors if name.endswith(endings)]:
            tensors[name] = mx.zeros_like(tensors[name])

    return change


# Nothing was learned.


@case("unchanged")
def updates_counted_and_reported_but_not_applied(scene: Scene) -> None:
    """The original trainer: counts, moments and metrics as after training, weights as before."""
    scene.offer(scene.initial)
    assert json.loads(scene.run.metrics.read_text().splitlines()[-1])["loss"] > 0


@case("no_effect", *["tier_unchanged"] * 3)
def weight_decay_alone_moves_lora_a(scene: Scene) -> None:
    decayed = leafwise(scene.initial, a=lambda a: 0.999 * a)
    scene.offer(decayed, change_moments=zeroed(".m", ".v"))


@case("no_effect", *["updates_missing"] * 3)
def weight_decay_alone_with_the_moments_of_real_training(scene: Scene) -> None:
    scene.offer(leafwise(scene.initial, a=lambda a: 0.999 * a))


@case("no_effect", *["updates_missing"] * 3)
def a_fresh_adapter_of_another_seed(scene: Scene) -> None:
    values = np.random.default_rng(99)
    scene.offer(
        leafwise(scene.initial, a=lambda a: mx.array(values.uniform(-0.1, 0.1, a.shape), a.dtype))
    )


@case("no_effect")
def every_tensor_zero(scene: Scene) -> None:
    # lora_b was zero before: only lora_a moved, and had no gradient to move by.
    no_gradients = zeroed("lora_b.m", "lora_b.v")
    scene.offer(leafwise(scene.initial, a=mx.zeros_like), change_moments=no_gradients)


@case("no_effect", *["updates_missing"] * 3)
def zeros_that_turned_negative(scene: Scene) -> None:
    scene.offer(leafwise(scene.initial, b=lambda b: -b))


@case(*["updates_missing"] * 3)
def a_change_of_1e_30(scene: Scene) -> None:
    scene.offer(leafwise(scene.initial, b=lambda b: b + 1e-30))


@case("no_effect")
def a_change_of_1e_30_everywhere(scene: Scene) -> None:
    """It is there in the files and in every product, and no logit knows of it."""
    scene.offer(leafwise(scene.initial, a=lambda a: a + 1e-7, b=lambda b: b + 1e-30))


# A part of it was learned.


@case("no_effect", "tier_unchanged", says="tier 2 (every 4): nothing was trained")
def the_slowest_tier_left_out(scene: Scene) -> None:
    scene.leave_out(scene.names(2))


@case("no_effect", "tier_unchanged")
def the_fastest_tier_left_out(scene: Scene) -> None:
    scene.leave_out(scene.names(0))


@case("updates_missing")
def one_lora_a_left_out(scene: Scene) -> None:
    scene.leave_out(scene.names(1, "lora_a")[:1])


@case("no_effect", "updates_missing")
def one_lora_b_left_out(scene: Scene) -> None:
    scene.leave_out(scene.names(1, "lora_b")[:1])


@case("no_effect", "updates_missing")
def one_module_left_out(scene: Scene) -> None:
    module = scene.names(0, "lora_a")[0].removesuffix("lora_a")
    scene.leave_out([name for name in scene.initial if name.startswith(module)])


@case(*["updates_missing"] * 3)
def only_lora_b_trained(scene: Scene) -> None:
    scene.leave_out([name for name in scene.initial if name.endswith("a")])


@case("tier_unchanged")
def a_tier_that_has_no_moment_anywhere(scene: Scene) -> None:
    scene.rewrite(change_moments=zeroed(*(f"{name}.v" for name in scene.names(1))))


@case(*["tier_unchanged"] * 3)
def all_moments_zero(scene: Scene) -> None:
    scene.rewrite(change_moments=zeroed(".v"))


# Counts that do not add up.


def _counted(tier: int, **counts: int) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["tiers"][tier].update(counts)


@case("updates_missing", says="8 updates were due by step 8, 7 were applied and 0 skipped")
def an_update_too_few(scene: Scene) -> None:
    scene.rewrite(change_state=_counted(0, updates=7))


@case("updates_missing", says="4 updates were due by step 8, 5 were applied and 0 skipped")
def an_update_too_many(scene: Scene) -> None:
    scene.rewrite(change_state=_counted(1, updates=5))


@case("updates_missing", says="2 updates were due by step 8, 0 were applied and 0 skipped")
def no_update_of_the_slowest_tier(scene: Scene) -> None:
    scene.rewrite(change_state=_counted(2, updates=0))


@case(*["updates_missing"] * 2, says="8 updates were due by step 8, 8 were applied and 1 skipped")
def a_skipped_update_beside_all_the_applied_ones(scene: Scene) -> None:
    scene.rewrite(change_state=_counted(0, skipped=1))


@case("updates_missing")
def more_updates_skipped_than_the_bound_allows(scene: Scene) -> None:
    scene.rewrite(change_state=_counted(0, updates=7, skipped=1))


@case("updates_missing", "updates_missing")
def a_flush_that_never_was(scene: Scene) -> None:
    scene.rewrite(change_state=lambda state: state.update(flush_steps=[3]))


# Values, names, shapes and dtypes.


@case("non_finite")
def a_nan_that_differs(scene: Scene) -> None:
    scene.change_one(scene.names(0)[0], lambda tensor: tensor * float("nan"), keeps_logits=False)


@case("non_finite")
def the_initial_adapter_with_one_nan(scene: Scene) -> None:
    name = scene.names(0)[0]
    scene.offer(scene.initial | {name: scene.initial[name] * float("nan")})


@case("tensor_missing")
def one_tensor_missing(scene: Scene) -> None:
    name = scene.names(1, "lora_b")[0]
    scene.rewrite(change_adapter=lambda t: t.pop(name), keeps_logits=True)


@case("tensor_missing", "tier_unchanged")
def one_tier_missing(scene: Scene) -> None:
    names = scene.names(2)
    scene.rewrite(change_adapter=lambda t: [t.pop(name) for name in names], keeps_logits=True)


@case("tensor_unexpected")
def one_tensor_too_many(scene: Scene) -> None:
    name = "model.layers.9.self_attn.q_proj.lora_a"
    scene.offer({name: mx.ones((64, 8))}, keeps_logits=True)


@case("tensor_missing", "tensor_unexpected")
def one_tensor_renamed(scene: Scene) -> None:
    name = scene.names(0, "lora_a")[0]
    scene.rewrite(change_adapter=lambda t: t.update({name.upper(): t.pop(name)}), keeps_logits=True)


@case("shape_mismatch")
def one_tensor_transposed(scene: Scene) -> None:
    scene.change_one(scene.names(0, "lora_a")[0], lambda tensor: tensor.T)


@case("dtype_mismatch")
def narrowed_to_bfloat16(scene: Scene) -> None:
    narrow = {name: value.astype(mx.bfloat16) for name, value in scene.trained.items()}
    scene.offer(narrow, keeps_logits=True)


# Configurations.


def _lora(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda meaning: meaning["lora_parameters"].update(changes)


@case("config_mismatch")
def another_rank_in_the_configuration(scene: Scene) -> None:
    scene.rewrite(change_config=_lora(rank=16))


@case("unreadable")
def a_configuration_that_plain_mlx_lm_cannot_use(scene: Scene) -> None:
    """Without num_layers from the start, as a faulty loader would have written it."""
    initial = change_config(scene.run.initial, lambda meaning: meaning.pop("num_layers"))
    found = {"initial": read_adapter(initial).digest(), "initial_files": files_sha256(initial)}
    scene.rewrite(
        change_config=lambda meaning: meaning.pop("num_layers"),
        change_state=lambda state: state["found"].update(found),
    )


@case("base_mismatch")
def another_base_in_the_configuration(scene: Scene) -> None:
    other = "sha256:" + "0" * 64
    scene.rewrite(change_config=lambda meaning: meaning.update(base_fingerprint=other))


@case("base_mismatch")
def a_base_exchanged_since(scene: Scene) -> FineTuneConfig:
    folder = base_copy(scene.run.path.parent / "base", rope_theta=500_000.0)
    return scene.configured(model=str(folder)).config


# What was written is not what was trained.


@case("config_mismatch")
def the_adapter_of_another_run_in_the_checkpoint(scene: Scene) -> None:
    scene.offer(load_arrays(scene.other.adapter / WEIGHTS_NAME), keeps_logits=True)


@case("config_mismatch")
def two_tiers_tensors_exchanged(scene: Scene) -> None:
    own, fast, slow = scene.trained, scene.names(0), scene.names(2)
    pairs = [(a, b) for a in fast for b in slow if a[15:] == b[15:]]
    swapped = {a: own[b] for a, b in pairs} | {b: own[a] for a, b in pairs}
    scene.offer(swapped, keeps_logits=True)


@case("config_mismatch")
def an_adapter_written_half_as_strong(scene: Scene) -> None:
    scene.offer(leafwise(scene.trained, b=lambda b: b / 2), keeps_logits=True)


@case("config_mismatch")
def an_adapter_with_one_module_of_noise(scene: Scene) -> None:
    scene.change_one(scene.names(2, "lora_b")[0], lambda tensor: tensor + 0.05)


# Losses.


@case("loss_regressed")
def a_worse_adapter(scene: Scene) -> None:
    scene.rewrite(change_adapter=turned_around)


@case("non_finite")
def finite_products_that_overflow_in_the_model(scene: Scene) -> None:
    scene.rewrite(change_adapter=shifted(1e17))


@case("loss_regressed", "examples_harmed")
def the_learned_direction_turned_around(scene: Scene) -> None:
    scene.offer(leafwise(scene.trained, b=lambda b: -b))


def suite_bounds(folder: Path, code: str) -> dict[str, Any]:
    """The gate's section with a suite that a worse adapter fails for this reason alone."""
    bounds = {"min": 1.0, "max_drop": None} if code == "task_below" else {"max_drop": 0.0}
    questions = (  # as the base was asked in its pre-training
        {"prompt": f"What is the capital of {country}?", "expected": capital}
        for country, capital in KNOWN[-20:]
    )
    suite = task(write_lines(folder / "suite.jsonl", questions), **bounds)
    return {"max_val_loss_increase": 1e9, "tasks": [suite]}


@case("task_below")
def answers_that_became_too_few(scene: Scene) -> FineTuneConfig:
    a_worse_adapter(scene)
    return scene.bounded(**suite_bounds(scene.run.path.parent, "task_below")).config


@case("task_regressed")
def answers_that_became_worse(scene: Scene) -> FineTuneConfig:
    a_worse_adapter(scene)
    return scene.bounded(**suite_bounds(scene.run.path.parent, "task_regressed")).config


@case("drift")
def predictions_that_moved_too_far(scene: Scene) -> FineTuneConfig:
    return scene.bounded(max_kl=0.001).config


def general_text(folder: Path, increase: float) -> dict[str, Any]:
    """The gate's keys that bound what becomes of one sentence that the base knows."""
    path = write_lines(folder / "general.jsonl", [{"text": "The capital of France is Paris."}])
    return {"general_data": str(path), "max_general_loss_increase": increase}


@case("forgetting")
def general_text_forgotten(scene: Scene) -> FineTuneConfig:
    return scene.bounded(**general_text(scene.run.path.parent, 0.0)).config


@case("unchanged")
def a_change_below_the_bound(scene: Scene) -> FineTuneConfig:
    return scene.bounded(min_relative_change=1.1).config


# Tampered with afterwards: damage.

NOT_THE_INITIAL = "initial is not the adapter that training began from"
TIERS_CHANGED = r"tiers\.json has changed since training began"
STATE_CHANGED = r"state\.json has changed since it was written"
COPY_IT_BACK = r"it has changed since\. Copy .* from the checkpoint back into it\."


@case(DAMAGED, says=NOT_THE_INITIAL)
def an_adapter_written_over_its_own_initial_file(scene: Scene) -> None:
    shutil.copyfile(scene.run.adapter / WEIGHTS_NAME, scene.run.initial / WEIGHTS_NAME)


@case(DAMAGED, says=NOT_THE_INITIAL)
def a_re_randomised_initial_adapter(scene: Scene) -> None:
    shutil.copyfile(scene.other.initial / WEIGHTS_NAME, scene.run.initial / WEIGHTS_NAME)


@case(DAMAGED, says=COPY_IT_BACK)
def the_adapter_of_another_run(scene: Scene) -> None:
    shutil.copyfile(scene.other.adapter / WEIGHTS_NAME, scene.run.adapter / WEIGHTS_NAME)


@case(DAMAGED, says="not a sound safetensors file.* It was cut short or changed")
def an_adapter_cut_short(scene: Scene) -> None:
    path = scene.run.adapter / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:1000])


@case(DAMAGED)
def the_checkpoint_of_another_run(scene: Scene) -> None:
    shutil.rmtree(scene.offered)
    shutil.copytree(checkpoint_path(scene.other.checkpoints, STEP), scene.offered)


@case(DAMAGED)
def the_checkpoint_of_another_step(scene: Scene) -> None:
    shutil.rmtree(scene.offered)
    shutil.copytree(checkpoint_path(scene.run.checkpoints, 4), scene.offered)


@case(DAMAGED)
def a_result_that_names_another_step(scene: Scene) -> None:
    result = json.loads(scene.run.result.read_bytes())
    scene.run.result.write_text(json.dumps(result | {"adapter_step": 4}))


@case(DAMAGED, says=TIERS_CHANGED)
def tiers_exchanged_in_tiers_json(scene: Scene) -> None:
    tiers = json.loads(scene.run.tiers.read_bytes())
    tiers["tensors"] = {name: 2 - tier for name, tier in tiers["tensors"].items()}
    scene.run.tiers.write_text(json.dumps(tiers))


@case(DAMAGED, says=TIERS_CHANGED)
def another_frequency_in_tiers_json(scene: Scene) -> None:
    content = scene.run.tiers.read_text()
    scene.run.tiers.write_text(content.replace("4", "8", 1))


@case(DAMAGED, says=STATE_CHANGED)
def edited_counts_in_state_json(scene: Scene) -> None:
    path = scene.offered / "state.json"
    path.write_text(path.read_text().replace('"updates": 8', '"updates": 9'))


@case(DAMAGED, says=STATE_CHANGED)
def edited_logits_in_state_json(scene: Scene) -> None:
    path = scene.offered / "state.json"
    state = json.loads(path.read_bytes())
    state["logits"]["values"][0][0] += 1
    path.write_text(json.dumps(state, indent=2) + "\n")


@case(DAMAGED)
def metrics_cut_short(scene: Scene) -> None:
    lines = scene.run.metrics.read_text().splitlines(keepends=True)
    scene.run.metrics.write_text("".join(lines[:-1]))


@case(DAMAGED)
def metrics_that_tell_of_another_loss(scene: Scene) -> None:
    scene.run.metrics.write_text(scene.run.metrics.read_text().replace("val_loss", "loss"))


# Honest all the same.


@case()
def an_honest_run(scene: Scene) -> None:
    pass


@case()
def an_honest_run_within_every_bound(scene: Scene) -> FineTuneConfig:
    bounds = general_text(scene.run.path.parent, 100.0)
    return scene.bounded(min_relative_change=1e-4, check_fused=is_there("fused"), **bounds).config


@case()
def a_skipped_update_within_the_bound(scene: Scene) -> FineTuneConfig:
    scene.rewrite(change_state=_counted(0, updates=7, skipped=1))
    return scene.bounded(max_skipped_share=0.125).config


@case()
def a_loss_that_rose_within_the_bound(scene: Scene) -> FineTuneConfig:
    a_worse_adapter(scene)
    return scene.bounded(max_val_loss_increase=100.0).config


@case()
def a_change_of_a_ten_thousandth(scene: Scene) -> None:
    trained, initial = scene.trained, scene.initial
    scene.offer({name: value + 1e-4 * (trained[name] - value) for name, value in initial.items()})
