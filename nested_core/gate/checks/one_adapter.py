"""The checks of one adapter alone, against the base that it is for and without an initial adapter.

They ask whether every module that the configuration names changes what the base computes: whether
names and shapes fit the base, no value is NaN, no product is zero within rounding, and plain
mlx_lm.load in a new process gives other logits than the base alone.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nested_core import backend
from nested_core.errors import ConfigError, DamagedError, join_first_values, shorten
from nested_core.gate.adapter_layout import AdapterLayout, BaseModelForAudit
from nested_core.gate.base_compatibility import RANK_AXES, fingerprint_reasons
from nested_core.gate.fresh_process_check import (
    ProofRequest,
    compute_logits_in_fresh_process,
    keep_prompts_with_finite_base,
    largest_difference,
    non_finite_reason,
)
from nested_core.gate.judged import Check, Checked
from nested_core.gate.lora_effect import (
    factor_names,
    overflow_reasons_of,
    product_norm,
    product_overflows,
)
from nested_core.gate.tensor_diff import frobenius_norm, reasons_about_tensors
from nested_core.models.peft import import_peft
from nested_core.models.peft.lora_factors import (
    FACTOR_DTYPES,
    MLX_LM_NAMING,
    leaf_name,
    module_name,
)
from nested_core.records.verdict import Code, Reason
from nested_core.storage.adapter import CONFIG_NAME
from nested_core.storage.safetensors_files import StoredTensor

# Norm of an update in units of its weight's: beyond it, nothing of the weight is left.
MAX_RELATIVE_EFFECT = 100.0
WHOLE_WEIGHT_LEAF_NAMES = {"weight", "bias", "scales", "biases"}


@dataclass(frozen=True)
class ModuleEffect:
    """One module: its rank, and scale * lora_a @ lora_b relative to the base's weight.

    effect: the ratio of the Frobenius norms; None if the weight is zero or the module has none.
    """

    name: str
    rank: int
    scale: float
    effect: float | None


@dataclass(frozen=True)
class LogitEffect:
    """How far the logits on fixed prompts are from the base's, and how far rounding reaches.

    rounding: half the step between numbers of the base's dtype at a prompt's largest logit, of
        the prompt whose logits moved furthest in these units.
    """

    prompts: int
    max_abs_difference: float
    rounding: float
    dtype: str


@dataclass
class Audited(Checked):
    """An adapter folder, what it should hold, and what its checks found so far."""

    folder: Path
    layout: AdapterLayout
    base: BaseModelForAudit
    reasons: list[Reason] = field(default_factory=list, init=False)
    modules: list[ModuleEffect] = field(default_factory=list, init=False)
    logits: LogitEffect | None = field(default=None, init=False)

    def add(self, check: Check[Any], reason: Reason) -> None:
        """Add a reason that a check gives."""
        self.given_by.append(check.name)
        self.reasons.append(reason)


def _find_refusal(audited: Audited) -> list[Reason]:
    """Why the folder holds no adapter that could be attached."""
    return [] if audited.layout.refusal is None else [audited.layout.refusal]


def _find_other_base(audited: Audited) -> list[Reason]:
    """A reason if what the configuration records of its base does not hold for this one."""
    config, base = audited.layout.config, audited.base
    if config.get("base_fingerprint") is not None:
        return fingerprint_reasons(config, base.folder)
    recorded = config.get("model") or config.get("base_model_name_or_path")
    other = None if recorded is None else base.find_differing_weight(recorded)
    if other is None:
        return []
    message = f"made for {shorten(recorded, 200)}, which has another {other} than {base.folder}"
    return [Reason("base_mismatch", message)]


def _find_unmatched_keys(audited: Audited) -> list[Reason]:
    """A reason for keys, or target_modules, that name no module of the base within reach."""
    if not audited.layout.unmatched_keys:
        return []
    keys = join_first_values(audited.layout.unmatched_keys, 3)
    setting = "keys" if audited.layout.format == "mlx-lm" else "target_modules"
    message = f"{setting} that match no module within reach of the adapter: {keys}"
    return [Reason("config_mismatch", message)]


def _find_unfit_tensors(audited: Audited) -> Iterator[Reason]:
    """Tensors by what is wrong with them first, and those that the configuration calls for."""
    layout = audited.layout
    if not layout.tensors:
        yield Reason("tensor_missing", "the file holds no tensor at all")
        return
    groups: dict[tuple[Code, str], list[str]] = {}
    for name in sorted(layout.tensors):
        if (found := _find_problem(name, layout, audited.base)) is not None:
            groups.setdefault(found, []).append(name)
    for (code, problem), names in groups.items():
        (reason,) = reasons_about_tensors(code, names, problem)
        shape = layout.tensors[names[0]].shape
        if (expected := layout.expected.get(names[0], shape)) != shape:
            message = f"{reason.message}: it is {list(shape)} for {list(expected)}"
            reason = replace(reason, message=message)
        yield reason
    if not groups or layout.expected.keys() & layout.tensors.keys():
        missing = layout.expected.keys() - layout.tensors.keys()
        called_for = f"called for by {CONFIG_NAME} and not in the file: their modules do nothing"
        yield from reasons_about_tensors("tensor_missing", missing, called_for)


def _find_problem(
    name: str, layout: AdapterLayout, base: BaseModelForAudit
) -> tuple[Code, str] | None:
    """What is wrong with a tensor that the adapter should not have, or not so."""
    leaf = leaf_name(name)
    if layout.has_whole_weights:
        if name not in base.shapes:
            return "base_mismatch", "that the base has no weights for"
    elif leaf not in MLX_LM_NAMING.leaves:
        if leaf not in WHOLE_WEIGHT_LEAF_NAMES or ".lora_" in name:
            return "tensor_unexpected", "without the name of a LoRA factor"
        problem = "with the names of weights of the base or of a fused model"
        return "tensor_unexpected", f"{problem}, where LoRA factors should be"
    elif module_name(name) not in base.modules:
        return "base_mismatch", "of modules that the base does not have"
    elif name not in layout.expected:
        return "config_mismatch", f"of no module and type that {CONFIG_NAME} calls for"
    return _find_problem_of_values(layout.tensors[name], leaf, layout.expected[name])


def _find_problem_of_values(
    tensor: StoredTensor, leaf: str, expected: Sequence[int]
) -> tuple[Code, str] | None:
    """What is wrong with a tensor's shape, dtype or numbers."""
    if tensor.shape != expected:
        if _differ_in_rank_alone(leaf, tensor.shape, expected):
            return "config_mismatch", f"of other shapes than {CONFIG_NAME} calls for"
        return "base_mismatch", "of other shapes than the base calls for"
    if tensor.dtype not in FACTOR_DTYPES:
        return "dtype_mismatch", f"of other dtypes than {', '.join(FACTOR_DTYPES)}"
    if not math.isfinite(frobenius_norm(tensor)):
        return "non_finite", "with NaN or infinity"
    return None


def _differ_in_rank_alone(leaf: str, shape: Sequence[int], expected: Sequence[int]) -> bool:
    axis = RANK_AXES.get((leaf, len(shape)))
    if axis is None or len(shape) != len(expected):
        return False
    return all(a == b for i, (a, b) in enumerate(zip(shape, expected, strict=True)) if i != axis)


def _find_effects(audited: Audited) -> Iterator[Reason]:
    """Measure each module whose tensors are sound: effects of none, or beyond all measure."""
    layout, base = audited.layout, audited.base
    unsound = {name for reason in audited.reasons for name in reason.tensors}
    sound = layout.tensors.keys() - unsound
    idle: list[str] = []
    huge: list[str] = []
    overflowing: list[str] = []
    for module, scale in sorted(layout.scales.items()):
        names = {f"{module}.{leaf}" for leaf in MLX_LM_NAMING.leaves} & layout.expected.keys()
        if not names <= sound:
            continue
        lora_a = layout.tensors[f"{module}.lora_a"]
        rank = lora_a.shape[RANK_AXES["lora_a", len(lora_a.shape)]]
        update = scale * product_norm(layout.tensors, module)
        weight = base.weight_norms(module)
        effect = update / weight.frobenius if weight is not None and weight.frobenius else None
        audited.modules.append(ModuleEffect(module, rank, scale, effect))
        if product_overflows(layout.tensors, module, scale):
            overflowing.append(module)
        elif effect is not None and effect > MAX_RELATIVE_EFFECT:
            huge.append(module)
        elif not _has_effect(layout, module, update, base):
            idle.append(module)
    if idle:
        message = f"{len(idle)} modules change nothing beyond the rounding of the base"
        yield Reason("no_effect", f"{message}, {idle[0]} first", factor_names(idle))
    yield from overflow_reasons_of(overflowing, "the adapter's")
    if huge:
        message = (
            f"{len(huge)} modules have an update of more than {MAX_RELATIVE_EFFECT:g} times their "
            f"weight, {huge[0]} first: the scale is not that of the training"
        )
        yield Reason("config_mismatch", message, factor_names(huge))


def _has_effect(
    layout: AdapterLayout, module: str, update_norm: float, base: BaseModelForAudit
) -> bool:
    """Whether the update moves the outputs of a module by more than half a rounding step.

    An input along the update's largest direction sees about sqrt(n) times the ratio of the norms,
    where n is the weight's shorter side. DoRA's magnitude counts where it is not the base's.
    """
    weight = base.weight_norms(module)
    if weight is None or weight.frobenius == 0:
        return update_norm > 0
    bound = base.rounding_step / 2 * weight.frobenius
    if update_norm * float(np.sqrt(weight.shorter_side)) > bound:
        return True
    magnitude = layout.tensors.get(f"{module}.m")
    if magnitude is None:
        return False
    distance = magnitude.to_numpy().astype(np.float64) - weight.rows
    return bool(np.linalg.norm(distance) > base.rounding_step * weight.frobenius)


def _find_logits_that_stay(audited: Audited) -> Iterator[Reason]:
    """Measure how far plain mlx_lm.load moves the logits in a new process."""
    base, adapter = audited.base, audited.folder
    with tempfile.TemporaryDirectory(prefix="nested-tune-audit-") as temporary:
        if audited.layout.format == "peft":
            adapter = Path(temporary, "adapter")
            try:
                import_peft(audited.folder, adapter, str(base.folder))
            except (ConfigError, DamagedError) as error:
                yield Reason("unreadable", shorten(error, 300))
                return
        is_float32 = backend.device() == "cpu"  # as training does there: smaller changes are seen
        request = ProofRequest(base.folder, None, adapter, is_float32=is_float32)
        answers = compute_logits_in_fresh_process(request)
    if isinstance(answers, Reason):
        yield answers
        return
    answers, _ = keep_prompts_with_finite_base(answers, None)
    if (reason := non_finite_reason(answers)) is not None:
        yield reason
        return
    pairs = list(zip(answers.initial, answers.trained, strict=True))
    rows = [(largest_difference(trained, plain), _largest(plain)) for plain, trained in pairs]
    moved, largest = max(rows, key=lambda row: row[0] / row[1] if row[1] else row[0])
    rounding, dtype = base.rounding_step / 2 * largest, str(base.dtype).removeprefix("mlx.core.")
    audited.logits = LogitEffect(len(rows), moved, rounding, dtype)
    if moved <= rounding:
        yield Reason(
            "no_effect",
            f"no logit of {len(rows)} fixed prompts moves beyond the rounding of {dtype}: by "
            f"{moved:.3g} at most, and rounding by up to {rounding:.3g}",
        )


def _largest(logits: np.ndarray[Any, np.dtype[Any]]) -> float:
    return float(np.abs(logits[np.isfinite(logits)]).max(initial=0))


BASE = Check("base", _find_other_base)
ADAPTER = Check("adapter", _find_refusal)
KEYS = Check("keys", _find_unmatched_keys)
TENSORS = Check("tensors", _find_unfit_tensors, stopped_by=(ADAPTER,))
EFFECT = Check("effect", _find_effects, stopped_by=(ADAPTER,))
LOGITS = Check("logits", _find_logits_that_stay, needs_all=True)
CHECKS_OF_ONE_ADAPTER = (BASE, ADAPTER, KEYS, TENSORS, EFFECT, LOGITS)
