"""The audit of adapters from anywhere, each against the base that it is for, by a list of checks.

Without an initial adapter they ask whether every module that the configuration names changes what
the base computes: whether names and shapes fit the base, no value is NaN, no product is zero within
rounding, and plain mlx_lm.load in a new process gives other logits than the base alone.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nested_core import backend
from nested_core.errors import ConfigError, DamagedError, join_first_values, shorten
from nested_core.gate.checks.judged import Check, Checked, run_checks
from nested_core.gate.proof.fresh_process_check import (
    ProofRequest,
    compute_logits_in_fresh_process,
    keep_prompts_with_finite_base,
    largest_difference,
    non_finite_reason,
)
from nested_core.gate.tensors.base_compatibility import RANK_AXES, fingerprint_reasons
from nested_core.gate.tensors.lora_effect import (
    factor_names,
    overflow_reasons_of,
    product_norm,
    product_overflows,
)
from nested_core.gate.tensors.tensor_diff import frobenius_norm, reasons_about_tensors
from nested_core.models.lora_tensors import (
    DORA_TENSORS,
    FACTOR_DTYPES,
    leaf_name,
    module_name,
)
from nested_core.records.verdict import Code, Reason
from nested_core.rooms.audit.adapter_layout import AdapterLayout, BaseModelForAudit, WeightNorms
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


@dataclass
class AdapterAudit(Checked):
    """An adapter folder, what it should hold, and what the checks found."""

    folder: Path
    layout: AdapterLayout
    base: BaseModelForAudit
    reasons: list[Reason] = field(default_factory=list, init=False)
    modules: list[ModuleEffect] = field(default_factory=list, init=False)
    logits: LogitEffect | None = field(default=None, init=False)

    def add(self, check: Check[Any], reason: Reason) -> None:
        """Add a reason that a check gives."""
        self.failed_checks.append(check.name)
        self.reasons.append(reason)

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
        fields: dict[str, Any] = finite_or_none(
            {
                "path": str(self.folder),
                "verdict": self.verdict,
                "reasons": [asdict(reason) for reason in self.reasons],
                "format": self.layout.format,
                "modules": [asdict(module) for module in self.modules],
                "logits": None if self.logits is None else asdict(self.logits),
            }
        )
        return fields

    def summary(self) -> str:
        """One line: the reasons, or what the adapter changes."""
        if not self.has_passed:
            return "; ".join(f"{r.code}: {r.message}" for r in self.reasons[:4])
        changed = f"{len(self.modules)} modules" if self.modules else "whole weights"
        moved = "" if self.logits is None else self.logits.max_abs_difference
        return f"{changed}, logits move by {moved:.3g}" if moved else changed


def _find_refusal(audit: AdapterAudit) -> list[Reason]:
    """Why the folder holds no adapter that could be attached."""
    return [] if audit.layout.refusal is None else [audit.layout.refusal]


def _find_other_base(audit: AdapterAudit) -> list[Reason]:
    """A reason if what the configuration records of its base does not hold for this one."""
    config, base = audit.layout.config, audit.base
    if config.get("base_fingerprint") is not None:
        return fingerprint_reasons(config, base.folder)
    recorded = config.get("model") or config.get("base_model_name_or_path")
    other = None if recorded is None else base.find_differing_weight(recorded)
    if other is None:
        return []
    message = f"made for {shorten(recorded, 200)}, which has another {other} than {base.folder}"
    return [Reason("base_mismatch", message)]


def _find_unmatched_keys(audit: AdapterAudit) -> list[Reason]:
    """A reason for keys, or target_modules, that name no module of the base within reach."""
    if not audit.layout.unmatched_keys:
        return []
    keys = join_first_values(audit.layout.unmatched_keys, 3)
    setting = "keys" if audit.layout.format == "mlx-lm" else "target_modules"
    message = f"{setting} that match no module within reach of the adapter: {keys}"
    return [Reason("config_mismatch", message)]


def _find_unfit_tensors(audit: AdapterAudit) -> Iterator[Reason]:
    """Tensors by what is wrong with them first, and those that the configuration calls for."""
    layout = audit.layout
    if not layout.tensors:
        yield Reason("tensor_missing", "the file holds no tensor at all")
        return
    groups: dict[tuple[Code, str], list[str]] = {}
    for name in sorted(layout.tensors):
        if (found := _find_problem(name, layout, audit.base)) is not None:
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
    elif leaf not in DORA_TENSORS:
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


def _find_effects(audit: AdapterAudit) -> Iterator[Reason]:
    """Measure each module whose tensors are sound: effects of none, or beyond all measure."""
    layout, base = audit.layout, audit.base
    unsound = {name for reason in audit.reasons for name in reason.tensors}
    sound = layout.tensors.keys() - unsound
    idle: list[str] = []
    huge: list[str] = []
    overflowing: list[str] = []
    for module, scale in sorted(layout.scales.items()):
        names = {f"{module}.{leaf}" for leaf in DORA_TENSORS} & layout.expected.keys()
        if not names <= sound:
            continue
        lora_a = layout.tensors[f"{module}.lora_a"]
        rank = lora_a.shape[RANK_AXES["lora_a", len(lora_a.shape)]]
        update = scale * product_norm(layout.tensors, module)
        weight = base.weight_norms(module)
        effect = update / weight.frobenius if weight is not None and weight.frobenius else None
        audit.modules.append(ModuleEffect(module, rank, scale, effect))
        if product_overflows(layout.tensors, module, scale):
            overflowing.append(module)
        elif effect is not None and effect > MAX_RELATIVE_EFFECT:
            huge.append(module)
        elif not _has_effect(update, weight, layout.tensors.get(f"{module}.m"), base.rounding_step):
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
    update: float, weight: WeightNorms | None, magnitude: StoredTensor | None, rounding_step: float
) -> bool:
    """Whether an update of this norm moves outputs by more than half a rounding step.

    An input along the update's largest direction sees about sqrt(n) times the ratio of the norms,
    where n is the weight's shorter side. DoRA's magnitude counts where it is not the base's.
    """
    if weight is None or weight.frobenius == 0:
        return update > 0
    bound = rounding_step * weight.frobenius
    if update * math.sqrt(weight.shorter_side) > bound / 2:
        return True
    if magnitude is None:
        return False
    return bool(np.linalg.norm(magnitude.to_numpy().astype(np.float64) - weight.rows) > bound)


def _find_logits_that_stay(audit: AdapterAudit) -> Iterator[Reason]:
    """Measure how far plain mlx_lm.load moves the logits in a new process."""
    base, adapter = audit.base, audit.folder
    with tempfile.TemporaryDirectory(prefix="nested-tune-audit-") as temporary:
        if audit.layout.foreign is not None:
            adapter = Path(temporary, "adapter")
            try:
                audit.layout.foreign.import_adapter(audit.folder, adapter, str(base.folder))
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
    audit.logits = LogitEffect(len(rows), moved, rounding, dtype)
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
            f"{WEIGHTS_NAME} (mlx-lm) or adapter_model.safetensors (PEFT) beside {CONFIG_NAME}."
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
            layout = base.layout_of(folder)
        except DamagedError as error:
            if len(folders) == 1:
                raise
            layout = AdapterLayout(None, {}, {}, refusal=Reason("unreadable", shorten(error, 300)))
        audits.append(_audit_folder(folder, layout, base))
        if on_audited is not None:
            on_audited("auditing adapters", len(audits), len(folders))
    return audits


def audit_adapter(folder: Path, base: BaseModelForAudit) -> AdapterAudit:
    """Audit one adapter folder; DamagedError if it is damaged or not safe to read."""
    return _audit_folder(folder, base.layout_of(folder), base)


def _audit_folder(folder: Path, layout: AdapterLayout, base: BaseModelForAudit) -> AdapterAudit:
    audit = AdapterAudit(folder, layout, base)
    run_checks(audit, CHECKS_OF_ONE_ADAPTER)
    return audit
