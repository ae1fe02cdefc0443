"""The tensors that an adapter's configuration calls for on a base model, for mlx-lm's and PEFT's.

mlx-lm's own code attaches the modules of an mlx-lm adapter, to a base whose weights are not read; a
PEFT adapter's are those that its target_modules name. Tensors have mlx-lm's names in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from nested_core.backend import to_float
from nested_core.errors import ConfigError, shorten
from nested_core.models.adapter_formats import AdapterFormat, Shape, find_format
from nested_core.models.base_model import find_model_folder_offline, fingerprint_base_model
from nested_core.models.base_modules import BaseModules
from nested_core.models.lora_tensors import DORA_TENSORS, leaf_name, module_name
from nested_core.models.parameters import float32_weight
from nested_core.records.verdict import Reason
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter, read_adapter_config
from nested_core.storage.safetensors_files import StoredTensor


@dataclass(frozen=True)
class AdapterLayout:
    """An adapter's tensors, and those that its configuration calls for on the base.

    format: the name of the adapter's format; None for a folder without an adapter.
    tensors: of the file, under mlx-lm's names and transposed as mlx-lm has them.
    expected: the shape of each tensor that the configuration calls for.
    scales: the factor on lora_a @ lora_b, by module.
    unmatched_keys: keys or target_modules that name no module of the base within reach.
    refusal: why mlx-lm, or the import from PEFT, takes no such configuration or folder; the fields
        before it are empty then.
    foreign: the format of an adapter of another program.
    """

    format: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    expected: Mapping[str, Shape] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    unmatched_keys: tuple[str, ...] = ()
    refusal: Reason | None = None
    foreign: AdapterFormat | None = None

    @property
    def has_whole_weights(self) -> bool:
        """Whether the tensors are meant to be weights of the base: mlx-lm's fine_tune_type full."""
        return self.format == "mlx-lm" and self.config.get("fine_tune_type") == "full"


@dataclass(frozen=True)
class WeightNorms:
    """Norms of a module's weight in float32: of all of it, and of each row; its shorter side."""

    frobenius: float
    rows: np.ndarray[Any, np.dtype[np.float32]]
    shorter_side: int


class BaseModelForAudit:
    """The base that adapters are audited against: its modules, parameters, and norms of weights."""

    def __init__(self, model: str) -> None:
        """Open a local folder or a repository of the hub; ConfigError if it cannot be."""
        self._opened = BaseModules.open(model)
        self._norms: dict[str, WeightNorms | None] = {}
        self._other_weights: dict[str, str | None] = {}
        parameters: Any = tree_flatten(self._opened.network.parameters())
        dtypes = Counter(v.dtype for _, v in parameters if mx.issubdtype(v.dtype, mx.floating))
        self.folder = self._opened.folder
        fingerprint_base_model(self.folder, max_age=0)
        self.modules = dict(self._opened.network.named_modules())
        self.shapes = {name: tuple(value.shape) for name, value in parameters}
        self.dtype = dtypes.most_common(1)[0][0]
        linear = self._opened.linear_modules()
        self._sides = {name: _input_and_output_dims(self.modules[name]) for name in linear}

    @property
    def rounding_step(self) -> float:
        """The relative distance between neighbouring numbers of the base's dtype."""
        return float(mx.finfo(self.dtype).eps)

    def weight_norms(self, module: str) -> WeightNorms | None:
        """Norms of a module's weight, dequantized if need be; None for a module without one.

        The weight is read from disk now, and let go of.
        """
        if module not in self._norms:
            self._norms[module] = _measure_weight(self.modules[module])
        return self._norms[module]

    def find_differing_weight(self, recorded_model: str) -> str | None:
        """The name of a weight that differs in `recorded_model`, None if no difference is seen.

        A model that is not on this machine cannot be compared, and of a quantized one only the
        weights that both hold in one dtype.
        """
        if recorded_model in self._other_weights:
            return self._other_weights[recorded_model]
        self._other_weights[recorded_model] = None
        folder = find_model_folder_offline(recorded_model)
        if folder is None or not (folder / "config.json").is_file():
            return None
        if fingerprint_base_model(folder) == fingerprint_base_model(self.folder):
            return None
        try:
            other = _read_parameters(folder)
        except ConfigError:  # what cannot be opened is not compared
            return None
        own = _read_parameters(self.folder)
        for name in sorted(own.keys() & other.keys(), key=lambda name: own[name].size):
            value, recorded_value = own.pop(name), other.pop(name)  # each pair is let go of
            is_comparable = value.dtype == recorded_value.dtype
            if is_comparable and not bool(mx.array_equal(value, recorded_value).item()):
                self._other_weights[recorded_model] = name
                return name
        return None

    def layout_of(self, folder: Path) -> AdapterLayout:
        """Read an adapter folder; DamagedError if it is damaged or not safe to read."""
        foreign = find_format(folder)
        if foreign is not None:
            return self._describe_foreign(folder, foreign)
        has_weights = (folder / WEIGHTS_NAME).exists()
        fused = [] if has_weights else sorted(folder.glob("model*.safetensors"))
        if not fused:
            return self._mlx_lm_layout(folder)
        message = f"holds a model ({fused[0].name}) and no adapter: it was fused into its base"
        return AdapterLayout(None, {}, {}, refusal=Reason("tensor_unexpected", message))

    def _mlx_lm_layout(self, folder: Path) -> AdapterLayout:
        adapter = read_adapter(folder, follow_links=True)
        layout = AdapterLayout("mlx-lm", adapter.config, adapter.tensors)
        if layout.has_whole_weights:
            shapes = {name: self.shapes[name] for name in adapter.tensors if name in self.shapes}
            return AdapterLayout("mlx-lm", adapter.config, adapter.tensors, shapes)
        try:
            expected, unmatched = self._expected_mlx_lm_tensors(adapter.config)
            scale = float(adapter.config["lora_parameters"]["scale"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {shorten(error, 200)}"
            refusal = Reason(
                "unreadable", f"mlx-lm cannot attach what {CONFIG_NAME} says: {problem}"
            )
            return AdapterLayout("mlx-lm", adapter.config, adapter.tensors, refusal=refusal)
        scales = dict.fromkeys({module_name(name) for name in expected}, scale)
        return AdapterLayout("mlx-lm", adapter.config, adapter.tensors, expected, scales, unmatched)

    def _expected_mlx_lm_tensors(
        self, config: Mapping[str, Any]
    ) -> tuple[dict[str, Shape], tuple[str, ...]]:
        """The adapter's tensors that mlx_lm.load would make, and keys that match no module."""
        from mlx_lm.tuner.utils import linear_to_lora_layers

        network = BaseModules.open(str(self.folder)).network
        parameters: Any = config["lora_parameters"]
        is_dora = config.get("fine_tune_type") == "dora"
        reached = network.layers[-max(config["num_layers"], 0) :]  # as mlx-lm slices them
        names = {name for layer in reached for name, _ in layer.named_modules()}
        linear_to_lora_layers(network, config["num_layers"], parameters, use_dora=is_dora)
        attached: Any = tree_flatten(network.parameters())
        expected = {
            name: tuple(value.shape)
            for name, value in attached
            if name not in self.shapes and leaf_name(name) in DORA_TENSORS
        }
        keys = parameters.get("keys") or ()
        return expected, tuple(key for key in keys if key not in names | self.modules.keys())

    def _describe_foreign(self, folder: Path, foreign: AdapterFormat) -> AdapterLayout:
        try:
            read = foreign.describe(folder, self._sides)
        except ConfigError as error:
            refusal = Reason("unreadable", shorten(error, 300))
            written = read_adapter_config(folder / CONFIG_NAME, follow_links=True)
            return AdapterLayout(foreign.name, written, {}, refusal=refusal, foreign=foreign)
        return AdapterLayout(
            format=foreign.name,
            config=read.config,
            tensors=read.tensors,
            expected=read.expected,
            scales=read.scales,
            unmatched_keys=read.unmatched_targets,
            foreign=foreign,
        )


def _read_parameters(folder: Path) -> dict[str, mx.array]:
    """The floating point parameters of a model by name, each to be read when it is evaluated."""
    parameters: Any = tree_flatten(BaseModules.open(str(folder)).network.parameters())
    return {n: value for n, value in parameters if mx.issubdtype(value.dtype, mx.floating)}


def _input_and_output_dims(module: nn.Module) -> tuple[int, int]:
    """Input and output dimensions of a linear module, as mlx-lm's LoRALinear derives them."""
    outputs, inputs = module.weight.shape
    if isinstance(module, nn.QuantizedLinear):
        inputs = inputs * 32 // module.bits
    return inputs, outputs


def _measure_weight(module: nn.Module) -> WeightNorms | None:
    if "weight" not in module:
        return None
    weight = float32_weight(module)
    norms = WeightNorms(
        frobenius=to_float(mx.linalg.norm(weight)),
        rows=np.array(mx.linalg.norm(weight, axis=-1)),
        shorter_side=min(weight.shape[-2:]),
    )
    for key in ("weight", "scales", "biases"):
        if key in module:
            module[key] = mx.zeros(0)  # lets go of what was read
    return norms
