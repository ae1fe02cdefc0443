"""Runs that look trained and are not, and honest ones: a table of what the gate must say of each.

Each is made of a finished run of eight steps on tiers [1, 2, 4], whose initial adapter is fresh:
lora_a at random, lora_b zero. The pairs of bare adapters are in file_pairs.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME, files_sha256, read_adapter
from nested_core.storage.checkpoint_verification import checkpoint_path
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays
from tests.core.gate.rewriting import Arrays, rewrite_run
from tests.example import DATA

DAMAGED = "damaged"  # no verdict at all: exit 6
STEP = 8


@dataclass(frozen=True)
class Scene:
    """A copy of the finished run to spoil, another run of the same kind, and the configuration."""

    config: FineTuneConfig
    run: RunDirectory
    other: RunDirectory

    @property
    def initial(self) -> Arrays:
        """The tensors that training began from."""
        return load_arrays(self.run.initial / WEIGHTS_NAME)

    @property
    def offered(self) -> Path:
        """The checkpoint that the adapter comes from."""
        return checkpoint_path(self.run.checkpoints, STEP)

    def names(self, tier: int, leaf: str = "") -> list[str]:
        """The tensors of a tier."""
        owners = json.loads(self.run.tiers.read_bytes())["tensors"]
        return [name for name, owner in owners.items() if owner == tier and name.endswith(leaf)]

    def rewrite(self, **changes: Any) -> None:
        """As a trainer with a fault would have left the run."""
        rewrite_run(self.config, self.run, **changes)

    def offer(self, tensors: Arrays) -> None:
        """These tensors in place of the trained ones; the rest stays the trained one's."""
        self.rewrite(change_adapter=lambda t: t.update(tensors))

    def bounded(self, **bounds: Any) -> FineTuneConfig:
        """The configuration with other bounds of the gate."""
        return self.config.model_copy(update={"gate": GateSection(**bounds)})


Build = Callable[[Scene], FineTuneConfig | None]


@dataclass(frozen=True)
class Case:
    """A run to judge: how it is made, and the reason codes expected, none for one that passes.

    `build` returns the configuration to judge with where that is another than the run's.
    """

    name: str
    build: Build
    expected: tuple[str, ...]


CASES: list[Case] = []


def case(*expected: str) -> Callable[[Build], Build]:
    """Enter a builder into the table, under its name."""

    def enter(build: Build) -> Build:
        CASES.append(Case(build.__name__, build, expected))
        return build

    return enter


# Nothing was learned.


@case("unchanged")
def updates_counted_and_reported_but_not_applied(scene: Scene) -> None:
    """The original trainer: counts, moments and metrics as after training, weights as before."""
    scene.offer(scene.initial)
    assert json.loads(scene.run.metrics.read_text().splitlines()[-1])["loss"] > 0


@case("no_effect", "tier_unchanged", "tier_unchanged", "tier_unchanged")
def weight_decay_alone_moves_lora_a(scene: Scene) -> None:
    def decayed(tensors: Arrays) -> None:
        factors = {name: 0.999 if name.endswith("a") else 1.0 for name in tensors}
        tensors.update({name: value * factors[name] for name, value in scene.initial.items()})

    def nothing_gathered(moments: Arrays) -> None:
        for name in [n for n in moments if n.endswith((".m", ".v"))]:
            moments[name] = mx.zeros_like(moments[name])

    scene.rewrite(change_adapter=decayed, change_moments=nothing_gathered)


@case("no_effect", "updates_missing", "updates_missing", "updates_missing")
def weight_decay_alone_with_the_moments_of_real_training(scene: Scene) -> None:
    initial = scene.initial
    scene.offer({n: v * (0.999 if n.endswith("a") else 1.0) for n, v in initial.items()})


@case("no_effect", "updates_missing", "updates_missing", "updates_missing")
def a_fresh_adapter_of_another_seed(scene: Scene) -> None:
    values = np.random.default_rng(99)
    scene.offer(
        {
            name: mx.array(values.uniform(-0.1, 0.1, value.shape).astype("f4"))
            if name.endswith("a")
            else value
            for name, value in scene.initial.items()
        }
    )


@case("no_effect")
def every_tensor_zero(scene: Scene) -> None:
    # lora_b was zero before: only lora_a moved, and had no gradient to move by.
    def no_gradients(moments: Arrays) -> None:
        for name in [n for n in moments if ".lora_b." in n]:
            moments[name] = mx.zeros_like(moments[name])

    zeros = {name: mx.zeros_like(value) for name, value in scene.initial.items()}
    scene.rewrite(change_adapter=lambda t: t.update(zeros), change_moments=no_gradients)


@case("no_effect", "updates_missing", "updates_missing", "updates_missing")
def zeros_that_turned_negative(scene: Scene) -> None:
    initial = scene.initial
    scene.offer({name: -value if name.endswith("b") else value for name, value in initial.items()})


@case("updates_missing", "updates_missing", "updates_missing")
def a_change_of_1e_30(scene: Scene) -> None:
    initial = scene.initial
    scene.offer({n: v + 1e-30 if n.endswith("b") else v for n, v in initial.items()})


@case("no_effect")
def a_change_of_1e_30_everywhere(scene: Scene) -> None:
    """It is there in the files and in every product, and no logit knows of it."""
    tiny = {"a": 1e-7, "b": 1e-30}
    scene.offer({name: value + tiny[name[-1]] for name, value in scene.initial.items()})


# A part of it was learned.


@case("no_effect", "tier_unchanged")
def the_slowest_tier_left_out(scene: Scene) -> None:
    initial = scene.initial
    scene.offer({name: initial[name] for name in scene.names(2)})


@case("no_effect", "tier_unchanged")
def the_fastest_tier_left_out(scene: Scene) -> None:
    initial = scene.initial
    scene.offer({name: initial[name] for name in scene.names(0)})


@case("updates_missing")
def one_lora_a_left_out(scene: Scene) -> None:
    name = scene.names(1, "lora_a")[0]
    scene.offer({name: scene.initial[name]})


@case("no_effect", "updates_missing")
def one_lora_b_left_out(scene: Scene) -> None:
    name = scene.names(1, "lora_b")[0]
    scene.offer({name: scene.initial[name]})


@case("no_effect", "updates_missing")
def one_module_left_out(scene: Scene) -> None:
    module = scene.names(0, "lora_a")[0].removesuffix("lora_a")
    scene.offer({name: value for name, value in scene.initial.items() if name.startswith(module)})


@case("updates_missing", "updates_missing", "updates_missing")
def only_lora_b_trained(scene: Scene) -> None:
    scene.offer({name: value for name, value in scene.initial.items() if name.endswith("a")})


@case("tier_unchanged")
def a_tier_that_has_no_moment_anywhere(scene: Scene) -> None:
    def forget(moments: Arrays) -> None:
        for name in scene.names(1):
            moments[f"{name}.v"] = mx.zeros_like(moments[f"{name}.v"])

    scene.rewrite(change_moments=forget)


@case("tier_unchanged", "tier_unchanged", "tier_unchanged")
def all_moments_zero(scene: Scene) -> None:
    def forget(moments: Arrays) -> None:
        for name in [name for name in moments if name.endswith(".v")]:
            moments[name] = mx.zeros_like(moments[name])

    scene.rewrite(change_moments=forget)


# Counts that do not add up.


def _counted(tier: int, **counts: int) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["tiers"][tier].update(counts)


@case("updates_missing")
def an_update_too_few(scene: Scene) -> None:
    scene.rewrite(change_state=_counted(0, updates=7))


@case("updates_missing")
def an_update_too_many(scene: Scene) -> None:
    scene.rewrite(change_state=_counted(1, updates=5))


@case("updates_missing")
def no_update_of_the_slowest_tier(scene: Scene) -> None:
    scene.rewrite(change_state=_counted(2, updates=0))


@case("updates_missing", "updates_missing")
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
    name = scene.names(0)[0]
    scene.rewrite(change_adapter=lambda t: t.update({name: t[name] * float("nan")}))


@case("non_finite")
def one_infinity(scene: Scene) -> None:
    name = scene.names(2, "lora_b")[0]

    def spoil(tensors: Arrays) -> None:
        tensors[name][0, 0] = float("-inf")

    scene.rewrite(change_adapter=spoil)


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
    def drop(tensors: Arrays) -> None:
        for name in scene.names(2):
            del tensors[name]

    scene.rewrite(change_adapter=drop, keeps_logits=True)


@case("tensor_unexpected")
def one_tensor_too_many(scene: Scene) -> None:
    name = "model.layers.9.self_attn.q_proj.lora_a"
    scene.rewrite(change_adapter=lambda t: t.update({name: mx.ones((64, 8))}), keeps_logits=True)


@case("tensor_missing", "tensor_unexpected")
def one_tensor_renamed(scene: Scene) -> None:
    name = scene.names(0, "lora_a")[0]
    scene.rewrite(change_adapter=lambda t: t.update({name.upper(): t.pop(name)}), keeps_logits=True)


@case("shape_mismatch")
def one_tensor_transposed(scene: Scene) -> None:
    name = scene.names(0, "lora_a")[0]
    scene.rewrite(change_adapter=lambda t: t.update({name: t[name].T}), keeps_logits=True)


@case("shape_mismatch")
def half_the_rank(scene: Scene) -> None:
    def halve(tensors: Arrays) -> None:
        for name, value in tensors.items():
            tensors[name] = value[:, :4] if name.endswith("a") else value[:4]

    scene.rewrite(change_adapter=halve, keeps_logits=True)


@case("dtype_mismatch")
def narrowed_to_bfloat16(scene: Scene) -> None:
    def narrow(tensors: Arrays) -> None:
        tensors.update({name: value.astype(mx.bfloat16) for name, value in tensors.items()})

    scene.rewrite(change_adapter=narrow, keeps_logits=True)


@case("dtype_mismatch")
def one_tensor_as_integers(scene: Scene) -> None:
    name = scene.names(0, "lora_a")[0]
    scene.rewrite(
        change_adapter=lambda t: t.update({name: t[name].view(mx.uint32)}), keeps_logits=True
    )


# Configurations.


def _lora(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda meaning: meaning["lora_parameters"].update(changes)


@case("config_mismatch")
def another_rank_in_the_configuration(scene: Scene) -> None:
    scene.rewrite(change_config=_lora(rank=16))


@case("config_mismatch")
def another_scale_in_the_configuration(scene: Scene) -> None:
    scene.rewrite(change_config=_lora(scale=20.0))


@case("config_mismatch")
def other_keys_in_the_configuration(scene: Scene) -> None:
    scene.rewrite(change_config=_lora(keys=["self_attn.q_proj"]))


@case("config_mismatch")
def fewer_layers_in_the_configuration(scene: Scene) -> None:
    scene.rewrite(change_config=lambda meaning: meaning.update(num_layers=3))


@case("config_mismatch")
def another_kind_in_the_configuration(scene: Scene) -> None:
    scene.rewrite(change_config=lambda meaning: meaning.update(fine_tune_type="dora"))


@case("unreadable")
def a_configuration_that_plain_mlx_lm_cannot_use(scene: Scene) -> None:
    """Without num_layers from the start, as a faulty loader would have written it."""
    path = scene.run.initial / CONFIG_NAME
    meaning = json.loads(path.read_bytes())
    del meaning["num_layers"]
    path.write_text(json.dumps(meaning))
    found = {
        "initial": read_adapter(scene.run.initial).digest(),
        "initial_files": files_sha256(scene.run.initial),
    }
    scene.rewrite(
        change_config=lambda meaning: meaning.pop("num_layers"),
        change_state=lambda state: state["found"].update(found),
    )


@case("base_mismatch")
def another_base_in_the_configuration(scene: Scene) -> None:
    scene.rewrite(
        change_config=lambda meaning: meaning.update(base_fingerprint="sha256:" + "0" * 64)
    )


@case("base_mismatch")
def a_base_exchanged_since(scene: Scene) -> FineTuneConfig:
    folder = Path(shutil.copytree(scene.config.model, scene.run.path.parent / "base"))
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 500_000.0}))
    return scene.config.model_copy(update={"model": str(folder)})


# What was written is not what was trained.


@case("config_mismatch")
def the_adapter_of_another_run_in_the_checkpoint(scene: Scene) -> None:
    other = load_arrays(scene.other.adapter / WEIGHTS_NAME)
    scene.rewrite(change_adapter=lambda t: t.update(other), keeps_logits=True)


@case("config_mismatch")
def two_tiers_tensors_exchanged(scene: Scene) -> None:
    def swap(tensors: Arrays) -> None:
        pairs = [(a, b) for a in scene.names(0) for b in scene.names(2) if a[15:] == b[15:]]
        for fast, slow in pairs:
            tensors[fast], tensors[slow] = tensors[slow], tensors[fast]

    scene.rewrite(change_adapter=swap, keeps_logits=True)


@case("config_mismatch")
def an_adapter_written_half_as_strong(scene: Scene) -> None:
    def halve(tensors: Arrays) -> None:
        tensors.update({n: v / 2 if n.endswith("b") else v for n, v in tensors.items()})

    scene.rewrite(change_adapter=halve, keeps_logits=True)


@case("config_mismatch")
def an_adapter_with_one_module_of_noise(scene: Scene) -> None:
    name = scene.names(2, "lora_b")[0]
    scene.rewrite(change_adapter=lambda t: t.update({name: t[name] + 0.05}), keeps_logits=True)


# Losses.


@case("loss_regressed")
def a_worse_adapter(scene: Scene) -> None:
    scene.rewrite(change_adapter=lambda t: t.update({n: v + 0.5 for n, v in t.items()}))


@case("non_finite")
def finite_weights_whose_product_overflows(scene: Scene) -> None:
    scene.rewrite(change_adapter=lambda t: t.update({n: v + 1e30 for n, v in t.items()}))


@case("non_finite")
def finite_products_that_overflow_in_the_model(scene: Scene) -> None:
    scene.rewrite(change_adapter=lambda t: t.update({n: v + 1e17 for n, v in t.items()}))


@case("non_finite")
def one_module_whose_product_overflows(scene: Scene) -> None:
    name = scene.names(2, "lora_b")[0]
    scene.rewrite(change_adapter=lambda t: t.update({name: t[name] * 0 + 3e38}))


@case("loss_regressed", "examples_harmed")
def the_learned_direction_turned_around(scene: Scene) -> None:
    scene.rewrite(
        change_adapter=lambda t: t.update({n: -v if n.endswith("b") else v for n, v in t.items()})
    )


def suite_bounds(folder: Path, code: str) -> dict[str, Any]:
    """The gate's section with a suite that a worse adapter fails for this reason alone."""
    text = (DATA / "train.jsonl").read_text(encoding="utf-8")
    facts = re.findall(r"Go and see (.+?), the capital of (.+?)!", text)
    lines = [
        json.dumps({"prompt": f"The capital of {country} is", "expected": capital})
        for capital, country in facts[:20]
    ]
    path = folder / "suite.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    suite = {"name": "capitals", "file": str(path), "score": "contains", "max_tokens": 6}
    bounds = {"min": 1.0, "max_drop": None} if code == "task_below" else {"max_drop": 0.0}
    return {"max_val_loss_increase": 1e9, "tasks": [suite | bounds]}


@case("task_below")
def answers_that_became_too_few(scene: Scene) -> FineTuneConfig:
    a_worse_adapter(scene)
    return scene.bounded(**suite_bounds(scene.run.path.parent, "task_below"))


@case("task_regressed")
def answers_that_became_worse(scene: Scene) -> FineTuneConfig:
    a_worse_adapter(scene)
    return scene.bounded(**suite_bounds(scene.run.path.parent, "task_regressed"))


@case("drift")
def predictions_that_moved_too_far(scene: Scene) -> FineTuneConfig:
    return scene.bounded(max_kl=0.001)


@case("forgetting")
def general_text_forgotten(scene: Scene) -> FineTuneConfig:
    path = scene.run.path.parent / "general.jsonl"
    path.write_text('{"text": "The capital of France is Paris."}\n')
    return scene.bounded(general_data=str(path), max_general_loss_increase=0.0)


@case("unchanged")
def a_change_below_the_bound(scene: Scene) -> FineTuneConfig:
    return scene.bounded(min_relative_change=1.1)


# Tampered with afterwards: damage.


@case(DAMAGED)
def an_adapter_written_over_its_own_initial_file(scene: Scene) -> None:
    shutil.copyfile(scene.run.adapter / WEIGHTS_NAME, scene.run.initial / WEIGHTS_NAME)


@case(DAMAGED)
def a_re_randomised_initial_adapter(scene: Scene) -> None:
    shutil.copyfile(scene.other.initial / WEIGHTS_NAME, scene.run.initial / WEIGHTS_NAME)


@case(DAMAGED)
def the_adapter_of_another_run(scene: Scene) -> None:
    shutil.copyfile(scene.other.adapter / WEIGHTS_NAME, scene.run.adapter / WEIGHTS_NAME)


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


@case(DAMAGED)
def tiers_exchanged_in_tiers_json(scene: Scene) -> None:
    tiers = json.loads(scene.run.tiers.read_bytes())
    tiers["tensors"] = {name: 2 - tier for name, tier in tiers["tensors"].items()}
    scene.run.tiers.write_text(json.dumps(tiers))


@case(DAMAGED)
def another_frequency_in_tiers_json(scene: Scene) -> None:
    content = scene.run.tiers.read_text()
    scene.run.tiers.write_text(content.replace("4", "8", 1))


@case(DAMAGED)
def edited_counts_in_state_json(scene: Scene) -> None:
    path = scene.offered / "state.json"
    path.write_text(path.read_text().replace('"updates": 8', '"updates": 9'))


@case(DAMAGED)
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
    path = scene.run.path.parent / "general.jsonl"
    path.write_text('{"text": "The capital of France is Paris."}\n')
    bounds = {"general_data": str(path), "max_general_loss_increase": 100.0}
    return scene.bounded(min_relative_change=1e-4, check_fused=True, **bounds)


@case()
def a_skipped_update_within_the_bound(scene: Scene) -> FineTuneConfig:
    scene.rewrite(change_state=_counted(0, updates=7, skipped=1))
    return scene.bounded(max_skipped_share=0.125)


@case()
def a_loss_that_rose_within_the_bound(scene: Scene) -> FineTuneConfig:
    scene.rewrite(change_adapter=lambda t: t.update({n: v + 0.5 for n, v in t.items()}))
    return scene.bounded(max_val_loss_increase=100.0)


@case()
def a_change_of_a_ten_thousandth(scene: Scene) -> FineTuneConfig:
    trained = load_arrays(scene.run.adapter / WEIGHTS_NAME)
    initial = scene.initial
    scene.offer({name: value + 1e-4 * (trained[name] - value) for name, value in initial.items()})
    return scene.config
