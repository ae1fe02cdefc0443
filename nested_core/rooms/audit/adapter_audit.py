"""Audit adapters from anywhere, each against the base that it is for.

Without an initial adapter the audit asks whether every module that the configuration names changes
what the base computes: whether names and shapes fit the base, no value is NaN, no product is zero
within rounding, and plain mlx_lm.load in a new process gives other logits than the base alone.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from nested_core import backend
from nested_core.backend import to_float
from nested_core.errors import ConfigError, DamagedError, join_first_values, shorten
from nested_core.gate.proof.fresh_process_check import (
    ProofRequest,
    compute_logits_in_fresh_process,
    keep_prompts_with_finite_base,
    largest_difference,
    non_finite_reason,
)
from nested_core.gate.tensors.base_compatibility import RANK_AXES, fingerprint_reasons
from nested_core.gate.tensors.lora_effect import factor_names, product_norm
from nested_core.gate.tensors.tensor_diff import frobenius_norm, reasons_about_tensors
from nested_core.models.adapter_formats import find_format
from nested_core.models.base_model import fingerprint_base_model
from nested_core.models.base_modules import BaseModules
from nested_core.models.lora_tensors import DORA_TENSORS, FACTOR_DTYPES, leaf_name, module_name
from nested_core.models.parameters import float32_weight
from nested_core.records.verdict import Code, Reason
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, read_adapter
from nested_core.storage.atomic import finite_or_none
from nested_core.text.groups import grouped

# Norm of an update in units of its weight's: beyond it, nothing of the weight is left.
MAX_RELATIVE_EFFECT = 100.0
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModuleEffect:
    """How much an adapter changes one module.

    effect: the Frobenius norm of scale * lora_a @ lora_b, as a multiple of that of the base's
        weight; None if the weight is zero.
    """

    name: str
    rank: int
    scale: float
    effect: float | None


@dataclass(frozen=True)
class LogitEffect:
    """How far an adapter moves the base's logits on fixed prompts.

    prompts: the number of prompts.
    max_abs_difference: the largest move of any logit.
    rounding: the move that rounding alone explains: half the step between neighbouring numbers of
        `dtype`, the base's, at the largest logit.
    """

    prompts: int
    max_abs_difference: float
    rounding: float
    dtype: str


@dataclass
class AdapterAudit:
    """What the audit of an adapter folder measured, and the reasons against the adapter.

    format: the name of the adapter's format; None if the adapter could not be read.
    """

    folder: Path
    format: str | None = None
    reasons: list[Reason] = field(default_factory=list)
    modules: list[ModuleEffect] = field(default_factory=list)
    logits: LogitEffect | None = None

    @property
    def verdict(self) -> str:
        """`passed` or `failed`, the words of gate.json."""
        return "failed" if self.reasons else "passed"

    def to_json(self) -> dict[str, Any]:
        """Return the adapter's entry in the document that --json prints."""
        fields = asdict(self)
        document = {"path": str(fields.pop("folder")), "verdict": self.verdict} | fields
        return dict(finite_or_none(document))

    def summary(self) -> str:
        """Return one line: the reasons, or what the adapter changes."""
        if self.reasons:
            return "; ".join(f"{r.code}: {r.message}" for r in self.reasons[:4])
        changed = f"{len(self.modules)} modules" if self.modules else "whole weights"
        moved = "" if self.logits is None else self.logits.max_abs_difference
        return f"{changed}, logits move by {moved:.3g}"


class BaseModelForAudit:
    """The base that adapters are audited against: its modules, shapes, and norms of weights."""

    def __init__(self, model: str) -> None:
        """Open a local folder or a repository of the hub; ConfigError if it cannot be."""
        opened = BaseModules.open(model)
        self.folder = opened.folder
        fingerprint_base_model(self.folder, max_age=0)
        self.modules = dict(opened.network.named_modules())
        parameters: Any = tree_flatten(opened.network.parameters())
        self.shapes = {name: tuple(value.shape) for name, value in parameters}
        dtypes = Counter(v.dtype for _, v in parameters if mx.issubdtype(v.dtype, mx.floating))
        self.dtype = dtypes.most_common(1)[0][0]
        self.rounding_step = float(mx.finfo(self.dtype).eps)
        self._norms: dict[str, tuple[float, int]] = {}

    def measure_weight(self, name: str) -> tuple[float, int]:
        """Return the Frobenius norm of a module's weight in float32, and its shorter side.

        The weight is read from disk at the first call, and let go of.
        """
        if name not in self._norms:
            module = self.modules[name]
            weight = float32_weight(module)
            self._norms[name] = to_float(mx.linalg.norm(weight)), min(weight.shape[-2:])
            for key in {"weight", "scales", "biases"} & module.keys():
                module[key] = mx.zeros(0)
        return self._norms[name]

    def expect_tensors(self, adapter: Adapter) -> tuple[dict[str, Shape], list[str]]:
        """Return the shapes of the tensors that an adapter should have, and keys without a module.

        The tensors, by name, are the factors (and DoRA's magnitudes) that mlx_lm.load would make
        for the adapter's configuration; for an adapter of whole weights, those of its tensors that
        the base has. The keys are those of the configuration that match no module of the base.

        Raises ConfigError if mlx-lm cannot attach what the configuration says.
        """
        from mlx_lm.tuner.utils import linear_to_lora_layers

        config = adapter.config
        if has_whole_weights(adapter):
            return {name: self.shapes[name] for name in adapter.tensors.keys() & self.shapes}, []
        try:
            network = BaseModules.open(str(self.folder)).network
            num_layers, parameters = config["num_layers"], config["lora_parameters"]
            last_layers = network.layers[-max(num_layers, 0) :]  # as mlx-lm slices them
            names = {name for layer in last_layers for name, _ in layer.named_modules()}
            is_dora = config.get("fine_tune_type") == "dora"
            linear_to_lora_layers(network, num_layers, parameters, use_dora=is_dora)
            _ = float(parameters["scale"])  # raises unless it is a number: mlx-lm takes anything
            unmatched = set(parameters.get("keys") or ()) - names - self.modules.keys()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {shorten(error, 200)}"
            raise ConfigError(f"mlx-lm cannot attach what {CONFIG_NAME} says: {problem}") from error
        tensors: Any = tree_flatten(network.parameters())
        added = {name: tuple(value.shape) for name, value in tensors if name not in self.shapes}
        expected = {name: shape for name, shape in added.items() if leaf_name(name) in DORA_TENSORS}
        return expected, sorted(unmatched)


def has_whole_weights(adapter: Adapter) -> bool:
    """Tell whether the tensors are weights of the base: mlx-lm's fine_tune_type full."""
    return adapter.config.get("fine_tune_type") == "full"


def _find_unfit_tensors(
    adapter: Adapter, expected: dict[str, Shape], base: BaseModelForAudit
) -> Iterator[Reason]:
    """Yield a reason for each problem of tensors, and for tensors that are missing."""
    found = ((_find_problem(one, adapter, expected, base), one) for one in sorted(adapter.tensors))
    groups = grouped((problem, name) for problem, name in found if problem is not None)
    for (code, problem_text), names in groups.items():
        (reason,) = reasons_about_tensors(code, names, problem_text)
        shape = adapter.tensors[names[0]].shape
        if (expected_shape := expected.get(names[0], shape)) != shape:
            message = f"{reason.message}: it is {list(shape)} for {list(expected_shape)}"
            reason = replace(reason, message=message)
        yield reason
    if not adapter.tensors:
        yield Reason("tensor_missing", "the file holds no tensor at all")
    elif not groups or expected.keys() & adapter.tensors.keys():
        missing = expected.keys() - adapter.tensors.keys()
        called_for = f"called for by {CONFIG_NAME} and not in the file: their modules do nothing"
        yield from reasons_about_tensors("tensor_missing", missing, called_for)


def _find_problem(
    name: str, adapter: Adapter, expected: dict[str, Shape], base: BaseModelForAudit
) -> tuple[Code, str] | None:
    """Return what is wrong with a tensor: its name, shape, dtype or numbers."""
    tensor, leaf = adapter.tensors[name], leaf_name(name)
    if has_whole_weights(adapter):
        is_in_base = name in base.shapes
    elif leaf not in DORA_TENSORS:
        problem = "that are no LoRA factors, such as weights of the base or of a fused model"
        return "tensor_unexpected", problem
    else:
        is_in_base = module_name(name) in base.modules
    if not is_in_base:
        return "base_mismatch", "that the base has no weights for"
    if name not in expected:
        return "config_mismatch", f"of no module and type that {CONFIG_NAME} calls for"
    sizes = list(zip_longest(tensor.shape, expected[name]))
    differing = {axis for axis, (size, wanted) in enumerate(sizes) if size != wanted}
    if differing - {RANK_AXES.get((leaf, len(sizes)))}:
        return "base_mismatch", "of other shapes than the base calls for"
    if differing:
        return "config_mismatch", f"of other shapes than {CONFIG_NAME} calls for"
    if tensor.dtype not in FACTOR_DTYPES:
        return "dtype_mismatch", f"of other dtypes than {', '.join(FACTOR_DTYPES)}"
    if not math.isfinite(frobenius_norm(tensor)):
        return "non_finite", "with NaN or infinity"
    return None


def _measure_modules(
    adapter: Adapter, expected: dict[str, Shape], base: BaseModelForAudit
) -> tuple[list[ModuleEffect], list[Reason]]:
    """Return the effect on each module, and reasons against modules with none or a huge one.

    An input along the update's largest direction sees about sqrt(n) times the ratio of the norms,
    where n is the weight's shorter side. It has to move by more than half a rounding step. DoRA's
    magnitudes count too: before training their norm is the weight's.
    """
    effects: list[ModuleEffect] = []
    idle: list[str] = []
    huge: list[str] = []
    scale = float(adapter.config["lora_parameters"]["scale"])
    for module in sorted({module_name(name) for name in expected}):
        lora_a = adapter.tensors[f"{module}.lora_a"]
        rank = lora_a.shape[RANK_AXES["lora_a", len(lora_a.shape)]]
        update = scale * product_norm(adapter.tensors, module)
        norm, shorter_side = base.measure_weight(module)
        magnitude = adapter.tensors.get(f"{module}.m")
        moved = 0.0 if magnitude is None else abs(frobenius_norm(magnitude) - norm)
        bound = base.rounding_step * norm
        effects.append(ModuleEffect(module, rank, scale, update / norm if norm else None))
        if norm and update > MAX_RELATIVE_EFFECT * norm:
            huge.append(module)
        elif update * math.sqrt(shorter_side) <= bound / 2 and moved <= bound:
            idle.append(module)
    reasons = []
    if idle:
        message = f"{len(idle)} modules change nothing beyond the rounding of the base"
        reasons.append(Reason("no_effect", f"{message}, {idle[0]} first", factor_names(idle)))
    if huge:
        message = (
            f"{len(huge)} modules have an update of more than {MAX_RELATIVE_EFFECT:g} times their "
            f"weight, {huge[0]} first: the scale is not that of the training"
        )
        reasons.append(Reason("config_mismatch", message, factor_names(huge)))
    return effects, reasons


def _measure_logits(
    adapter: Path, base: BaseModelForAudit
) -> tuple[LogitEffect | None, list[Reason]]:
    """Measure how far the adapter moves the logits, with plain mlx_lm.load in a new process.

    The reasons against the adapter come second: the process failed, a logit is not finite (both
    without a measurement), or no logit moves beyond rounding.
    """
    is_float32 = backend.device() == "cpu"  # as in training there: it shows smaller changes
    request = ProofRequest(base.folder, None, adapter, is_float32=is_float32)
    answers = compute_logits_in_fresh_process(request)
    if isinstance(answers, Reason):
        return None, [answers]
    answers, _ = keep_prompts_with_finite_base(answers, None)
    if (reason := non_finite_reason(answers)) is not None:
        return None, [reason]
    moved = largest_difference(answers.trained, answers.initial)
    largest = float(np.abs(answers.initial[np.isfinite(answers.initial)]).max(initial=0))
    rounding, dtype = base.rounding_step / 2 * largest, str(base.dtype).removeprefix("mlx.core.")
    logits = LogitEffect(len(answers.initial), moved, rounding, dtype)
    if moved > rounding:
        return logits, []
    message = (
        f"no logit of {logits.prompts} fixed prompts moves beyond the rounding of {dtype}: "
        f"by {moved:.3g} at most, and rounding by up to {rounding:.3g}"
    )
    return logits, [Reason("no_effect", message)]


def audit_adapter(folder: Path, base: BaseModelForAudit) -> AdapterAudit:
    """Audit one adapter folder; DamagedError if it is damaged or not safe to read.

    An adapter of another program is imported first, and judged as mlx-lm would use it.
    """
    audit = AdapterAudit(folder)
    foreign = find_format(folder)
    weights = [] if (folder / WEIGHTS_NAME).exists() else sorted(folder.glob("model*.safetensors"))
    if weights:
        message = f"holds a model ({weights[0].name}) and no adapter: it was fused into its base"
        audit.reasons = [Reason("tensor_unexpected", message)]
        return audit
    audit.format = "mlx-lm" if foreign is None else foreign.name
    with tempfile.TemporaryDirectory(prefix="nested-tune-audit-") as temporary:
        try:
            if foreign is not None:
                folder = Path(temporary, "adapter")
                foreign.import_adapter(audit.folder, folder, str(base.folder))
            _judge(audit, read_adapter(folder, follow_links=True), base)
        except ConfigError as error:
            audit.reasons = [Reason("unreadable", shorten(error, 300))]
    return audit


def _judge(audit: AdapterAudit, adapter: Adapter, base: BaseModelForAudit) -> None:
    """Add the reasons against an mlx-lm adapter; measurements need an adapter that fits."""
    expected, unmatched = base.expect_tensors(adapter)
    audit.reasons += fingerprint_reasons(adapter.config, base.folder)
    if unmatched:
        keys = join_first_values(unmatched, 3)
        message = f"keys that match no module within reach of the adapter: {keys}"
        audit.reasons.append(Reason("config_mismatch", message))
    unfit = list(_find_unfit_tensors(adapter, expected, base))
    audit.reasons += unfit
    if not unfit and not has_whole_weights(adapter):
        audit.modules, reasons = _measure_modules(adapter, expected, base)
        audit.reasons += reasons
    if not audit.reasons:
        audit.logits, audit.reasons = _measure_logits(adapter.path, base)


def audit_adapters(
    folders: Sequence[Path], model: str, on_audited: Callable[[str, int, int], None]
) -> list[AdapterAudit]:
    """Audit each adapter folder against the base `model`, a folder or a repository of the hub.

    Raises ConfigError if a folder holds no adapter or the base cannot be opened, and DamagedError
    if the only adapter is damaged or not safe to read; among several, a damaged one is
    `unreadable`.
    """
    for folder in folders:
        require_adapter(folder)
    base = BaseModelForAudit(model)
    audits = []
    for folder in folders:
        try:
            audits.append(audit_adapter(folder, base))
        except DamagedError as error:
            if len(folders) == 1:
                raise
            audits.append(AdapterAudit(folder, reasons=[Reason("unreadable", shorten(error, 300))]))
        on_audited("auditing adapters", len(audits), len(folders))
    return audits


def require_adapter(folder: Path) -> None:
    """Raise ConfigError for a folder without an adapter's configuration and without weights."""
    if not ((folder / CONFIG_NAME).exists() or any(folder.glob("*.safetensors"))):
        raise ConfigError(
            f"{str(folder):.300} holds no adapter. Expected {WEIGHTS_NAME} (mlx-lm) or "
            f"adapter_model.safetensors (PEFT) beside {CONFIG_NAME}. For all in a folder give "
            f"FOLDER/*."
        )
