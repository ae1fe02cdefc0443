"""The audit of an adapter from anywhere, with the base that it is for and no initial adapter.

It asks whether every module that the configuration names changes what the base computes: whether
names and shapes fit the base, no value is NaN, no product is zero within rounding, and plain
mlx_lm.load in a new process gives other logits than the base alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nested_core import backend
from nested_core.errors import ConfigError, DamagedError, join_first_values, shorten
from nested_core.gate.adapter_layout import AdapterLayout, BaseModelForAudit
from nested_core.gate.base_compatibility import RANK_AXES, fingerprint_reasons
from nested_core.gate.fresh_process_check import (
    FreshProcessLogits,
    ProofRequest,
    compute_logits_in_fresh_process,
    keep_prompts_with_finite_base,
    largest_difference,
    non_finite_reason,
)
from nested_core.gate.lora_effect import LARGEST_FLOAT32, factor_names, product_norm
from nested_core.gate.tensor_diff import reasons_about_tensors
from nested_core.models.peft import import_peft
from nested_core.models.peft.importing import PEFT_WEIGHTS, PICKLE_FILE_NAMES
from nested_core.models.peft.lora_factors import (
    FACTOR_DTYPES,
    MLX_LM_NAMING,
    leaf_name,
    module_name,
)
from nested_core.records.verdict import Code, Reason
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import REASONS_BY_UNSAFE_SUFFIX, StoredTensor

# Norm of an update in units of its weight's: beyond it, nothing of the weight is left.
MAX_RELATIVE_EFFECT = 100.0
WHOLE_WEIGHT_LEAF_NAMES = {"weight", "bias", "scales", "biases"}
OnAudited = Callable[[str, int, int], None]


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


@dataclass(frozen=True)
class AdapterAudit:
    """What the audit of one adapter folder says."""

    path: str
    reasons: tuple[Reason, ...]
    format: Literal["mlx-lm", "peft"] | None = None
    modules: tuple[ModuleEffect, ...] = ()
    logits: LogitEffect | None = None

    @property
    def has_passed(self) -> bool:
        """Whether there is no reason against the adapter."""
        return not self.reasons

    @property
    def verdict(self) -> Literal["passed", "failed"]:
        """The word for it, as in gate.json."""
        return "passed" if self.has_passed else "failed"

    def to_json(self) -> dict[str, Any]:
        """The adapter's entry in the document that --json prints."""
        fields: dict[str, Any] = finite_or_none(asdict(self))
        return {"path": fields.pop("path"), "verdict": self.verdict} | fields

    def summary(self) -> str:
        """One line: the reasons, or what the adapter changes."""
        if not self.has_passed:
            return "; ".join(f"{r.code}: {r.message}" for r in self.reasons[:4])
        changed = f"{len(self.modules)} modules" if self.modules else "whole weights"
        moved = (
            "" if self.logits is None else f", logits move by {self.logits.max_abs_difference:.3g}"
        )
        return f"{changed}{moved}"


def find_adapters(path: Path, model: str) -> tuple[list[Path], list[Path]]:
    """The adapter folders that a path stands for, and folders in it that hold none.

    A path is an adapter, a run directory, or a folder of these, beside which the base `model` may
    lie. Raises ConfigError for another path.
    """
    if path.is_dir() and (adapter := _adapter_of_run(path)) is not None:
        return [adapter], []  # before its other files are looked at: none of them is read
    if not path.is_dir() or _is_adapter(path):
        return [path], []  # what is wrong with a file is found by reading it
    children = [child for child in sorted(path.iterdir()) if child.is_dir()]
    own = [child for child in children if not child.name.startswith(".")]
    adapters = [_adapter_of_run(child) or child for child in own]
    base = Path(model).resolve()
    found = [one for one in adapters if _is_adapter(one) and one.resolve() != base]
    if not found:
        raise ConfigError(
            f"{str(path):.300} holds no adapter, nor do the folders in it. Expected "
            f"{WEIGHTS_NAME} (mlx-lm) or {PEFT_WEIGHTS} (PEFT) beside {CONFIG_NAME}."
        )
    return found, [adapter for adapter in adapters if adapter not in found]


def _is_adapter(folder: Path) -> bool:
    """Whether a folder is to be audited: it has an adapter's files, or other weights."""
    names = [path.name for path in folder.iterdir()]
    is_weights = any(
        Path(name).suffix in {".safetensors", *REASONS_BY_UNSAFE_SUFFIX} for name in names
    )
    return is_weights or CONFIG_NAME in names


def _adapter_of_run(folder: Path) -> Path | None:
    run = RunDirectory(folder)
    return run.adapter if run.config.is_file() and run.adapter.is_dir() else None


def audit_adapters(
    folders: Sequence[Path], model: str, on_audited: OnAudited | None = None
) -> list[AdapterAudit]:
    """Audit each adapter folder against the base `model`, a folder or a repository of the hub.

    Raises ConfigError if the base cannot be opened, and DamagedError if the only adapter is damaged
    or not safe to read; among several, a damaged one is `unreadable`.
    """
    base = BaseModelForAudit(model)
    audits = []
    for folder in folders:
        try:
            audits.append(audit_adapter(folder, base))
        except DamagedError as error:
            if len(folders) == 1:
                raise
            reason = Reason("unreadable", shorten(error, 300))
            audits.append(AdapterAudit(str(folder), (reason,)))
        if on_audited is not None:
            on_audited("auditing adapters", len(audits), len(folders))
    return audits


def audit_adapter(folder: Path, base: BaseModelForAudit) -> AdapterAudit:
    """Audit one adapter folder; DamagedError if it is damaged or not safe to read."""
    if (reason := _fused_model_reason(folder)) is not None:
        return AdapterAudit(str(folder), (reason,))
    is_peft = not (folder / WEIGHTS_NAME).exists() and any(
        (folder / name).exists() for name in (PEFT_WEIGHTS, *PICKLE_FILE_NAMES)
    )
    layout = base.layout_of(folder, is_peft=is_peft)
    reasons = _base_reasons(layout, base) + _structure_reasons(layout, base)
    reasons += _value_reasons(layout)
    effects, effect_reasons = _judge_effects(layout, base)
    reasons += effect_reasons
    logits = None
    if not reasons:
        logits, reasons = _judge_logits(folder, base, is_peft=is_peft)
    return AdapterAudit(str(folder), tuple(reasons), layout.format, tuple(effects), logits)


def _fused_model_reason(folder: Path) -> Reason | None:
    """A reason for a folder that mlx_lm.fuse wrote, which holds a model."""
    if not folder.is_dir() or (folder / WEIGHTS_NAME).exists() or (folder / PEFT_WEIGHTS).exists():
        return None
    weights = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not weights:
        return None
    message = f"holds a model ({weights[0]}) and no adapter: it was fused into its base"
    return Reason("tensor_unexpected", message)


def _base_reasons(layout: AdapterLayout, base: BaseModelForAudit) -> list[Reason]:
    """A reason if what the configuration records of its base does not hold for this one."""
    if layout.config.get("base_fingerprint") is not None:
        return fingerprint_reasons(layout.config, base.folder)
    recorded = layout.config.get("model") or layout.config.get("base_model_name_or_path")
    other = None if recorded is None else base.find_differing_weight(recorded)
    if other is None:
        return []
    message = f"made for {shorten(recorded, 200)}, which has another {other} than {base.folder}"
    return [Reason("base_mismatch", message)]


def _structure_reasons(layout: AdapterLayout, base: BaseModelForAudit) -> list[Reason]:
    """Reasons for tensors that do not fit the base, or not what the configuration calls for."""
    reasons = [] if layout.refusal is None else [layout.refusal]
    if layout.unmatched_keys:
        keys = join_first_values(layout.unmatched_keys, 3)
        setting = "keys" if layout.format == "mlx-lm" else "target_modules"
        message = f"{setting} that match no module within reach of the adapter: {keys}"
        reasons.append(Reason("config_mismatch", message))
    if not layout.tensors and layout.refusal is None:
        return [*reasons, Reason("tensor_missing", "the file holds no tensor at all")]
    if layout.has_whole_weights:
        return reasons + _whole_weight_reasons(layout, base)
    factors = {name for name in layout.tensors if leaf_name(name) in MLX_LM_NAMING.leaves}
    others = layout.tensors.keys() - factors
    weights = {n for n in others if leaf_name(n) in WHOLE_WEIGHT_LEAF_NAMES and ".lora_" not in n}
    reasons += reasons_about_tensors(
        "tensor_unexpected",
        weights,
        "with the names of weights of the base or of a fused model, where LoRA factors should be",
    )
    reasons += reasons_about_tensors(
        "tensor_unexpected", others - weights, "without the name of a LoRA factor"
    )
    foreign = {name for name in factors if module_name(name) not in base.modules}
    reasons += reasons_about_tensors(
        "base_mismatch", foreign, "of modules that the base does not have"
    )
    if layout.refusal is not None:
        return reasons
    factors -= foreign
    reasons += _shape_reasons(layout, factors & layout.expected.keys())
    unreached = factors - layout.expected.keys()
    reasons += reasons_about_tensors(
        "config_mismatch", unreached, f"of no module and type that {CONFIG_NAME} calls for"
    )
    if factors or not (foreign or others):
        missing = layout.expected.keys() - layout.tensors.keys()
        problem = f"called for by {CONFIG_NAME} and not in the file: their modules do nothing"
        reasons += reasons_about_tensors("tensor_missing", missing, problem)
    return reasons


def _whole_weight_reasons(layout: AdapterLayout, base: BaseModelForAudit) -> list[Reason]:
    foreign = layout.tensors.keys() - base.shapes.keys()
    misfits = [n for n in layout.tensors if n not in foreign and not _has_expected_shape(layout, n)]
    return reasons_about_tensors(
        "base_mismatch", foreign, "that the base has no weights for"
    ) + reasons_about_tensors("base_mismatch", misfits, "of other shapes than in the base")


def _shape_reasons(layout: AdapterLayout, names: Iterable[str]) -> list[Reason]:
    """Reasons for other ranks than the configuration says, and for dimensions of another base."""
    misfits = sorted(name for name in names if not _has_expected_shape(layout, name))
    of_rank = [name for name in misfits if _differs_in_rank_alone(layout, name)]
    others = [name for name in misfits if name not in of_rank]
    reasons = []
    sides: list[tuple[Code, list[str], str]] = [
        ("config_mismatch", of_rank, CONFIG_NAME),
        ("base_mismatch", others, "the base"),
    ]
    for code, wrong, side in sides:
        if wrong:
            first = wrong[0]
            message = (
                f"{len(wrong)} tensors have other shapes than {side} calls for: {first} is "
                f"{list(layout.tensors[first].shape)} for {list(layout.expected[first])}"
            )
            reasons.append(Reason(code, message, tuple(wrong)))
    return reasons


def _differs_in_rank_alone(layout: AdapterLayout, name: str) -> bool:
    own, expected = layout.tensors[name].shape, layout.expected[name]
    axis = RANK_AXES.get((leaf_name(name), len(own)))
    if axis is None or len(own) != len(expected):
        return False
    return all(a == b for i, (a, b) in enumerate(zip(own, expected, strict=True)) if i != axis)


def _value_reasons(layout: AdapterLayout) -> list[Reason]:
    """Reasons for dtypes that hold no weights, and for NaN and infinity."""
    strange = {name for name, tensor in layout.tensors.items() if tensor.dtype not in FACTOR_DTYPES}
    broken = {n for n, t in layout.tensors.items() if n not in strange and not _is_finite(t)}
    return reasons_about_tensors(
        "dtype_mismatch", strange, f"of other dtypes than {', '.join(FACTOR_DTYPES)}"
    ) + reasons_about_tensors("non_finite", broken, "with NaN or infinity")


def _judge_effects(
    layout: AdapterLayout, base: BaseModelForAudit
) -> tuple[list[ModuleEffect], list[Reason]]:
    """The effect of each sound module, and reasons for effects of none or beyond all measure."""
    effects = []
    idle: list[str] = []
    huge: list[str] = []
    overflowing: list[str] = []
    for module, scale in sorted(layout.scales.items()):
        names = [f"{module}.{leaf}" for leaf in MLX_LM_NAMING.leaves]
        if not all(_is_sound_tensor(layout, name) for name in names if name in layout.expected):
            continue
        lora_a = layout.tensors[f"{module}.lora_a"]
        rank = lora_a.shape[RANK_AXES["lora_a", len(lora_a.shape)]]
        update = scale * product_norm(layout.tensors, module)
        weight = base.weight_norms(module)
        is_measured = weight is not None and weight.frobenius > 0
        effect = update / weight.frobenius if weight is not None and is_measured else None
        effects.append(ModuleEffect(module, rank, scale, effect))
        if update > LARGEST_FLOAT32:
            overflowing.append(module)
        elif effect is not None and effect > MAX_RELATIVE_EFFECT:
            huge.append(module)
        elif not _has_effect(layout, module, update, base):
            idle.append(module)
    reasons = [
        *_reason_about_modules("no_effect", idle, "change nothing beyond the rounding of the base"),
        *_reason_about_modules(
            "non_finite", overflowing, "overflow float32 in scale * lora_a @ lora_b"
        ),
        *_reason_about_modules(
            "config_mismatch",
            huge,
            f"have an update of more than {MAX_RELATIVE_EFFECT:g} times their weight: the scale "
            f"is not that of the training",
        ),
    ]
    return effects, reasons


def _has_effect(
    layout: AdapterLayout, module: str, update_norm: float, base: BaseModelForAudit
) -> bool:
    """Whether a module's output can differ from the base's by more than half a rounding step.

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


def _judge_logits(
    folder: Path, base: BaseModelForAudit, *, is_peft: bool
) -> tuple[LogitEffect | None, list[Reason]]:
    """How far plain mlx_lm.load moves the logits in a new process, and a reason if it does not."""
    with tempfile.TemporaryDirectory(prefix="nested-tune-audit-") as temporary:
        adapter = folder
        if is_peft:
            adapter = Path(temporary, "adapter")
            try:
                import_peft(folder, adapter, str(base.folder))
            except (ConfigError, DamagedError) as error:
                return None, [Reason("unreadable", shorten(error, 300))]
        is_float32 = backend.device() == "cpu"  # as training does there: smaller changes are seen
        request = ProofRequest(base.folder, None, adapter, is_float32=is_float32)
        answers = compute_logits_in_fresh_process(request)
    if isinstance(answers, Reason):
        return None, [answers]
    answers, _ = keep_prompts_with_finite_base(answers, None)
    if (reason := non_finite_reason(answers)) is not None:
        return None, [reason]
    effect = _measure_logits(answers, base)
    if effect.max_abs_difference > effect.rounding:
        return effect, []
    message = (
        f"no logit of {effect.prompts} fixed prompts moves beyond the rounding of {effect.dtype}: "
        f"by {effect.max_abs_difference:.3g} at most, and rounding by up to {effect.rounding:.3g}"
    )
    return effect, [Reason("no_effect", message)]


def _measure_logits(answers: FreshProcessLogits, base: BaseModelForAudit) -> LogitEffect:
    rows = [
        (
            largest_difference(trained, plain),
            float(np.abs(plain[np.isfinite(plain)]).max(initial=0)),
        )
        for plain, trained in zip(answers.initial, answers.trained, strict=True)
    ]
    moved, largest = max(rows, key=lambda row: row[0] / row[1] if row[1] else row[0])
    dtype = str(base.dtype).removeprefix("mlx.core.")
    return LogitEffect(len(rows), moved, base.rounding_step / 2 * largest, dtype)


def _has_expected_shape(layout: AdapterLayout, name: str) -> bool:
    return layout.tensors[name].shape == layout.expected[name]


def _is_sound_tensor(layout: AdapterLayout, name: str) -> bool:
    """Whether a tensor that is called for is there, fits, and holds finite numbers."""
    tensor = layout.tensors.get(name)
    if tensor is None or not _has_expected_shape(layout, name):
        return False
    return tensor.dtype in FACTOR_DTYPES and _is_finite(tensor)


def _is_finite(tensor: StoredTensor) -> bool:
    return bool(np.isfinite(tensor.to_numpy()).all())


def _reason_about_modules(code: Code, modules: Sequence[str], problem: str) -> list[Reason]:
    """One reason that names the modules' factors, or none without any module."""
    if not modules:
        return []
    message = f"{len(modules)} modules {problem}, {modules[0]} first"
    return [Reason(code, message, factor_names(modules))]
