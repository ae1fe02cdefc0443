"""The memory footprint of a loaded model and of each of its layers, read from modules' shapes.

Nothing is computed. Modules are known by mlx-lm's names; what other modules keep is not counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx_lm.models import gemma2, gemma3_text
from mlx_lm.tuner.lora import LoRALinear

from nested_core.kernels.device_operations import has_kernel_for_rank
from nested_core.kernels.quantized_linear import METHODS
from nested_core.models.base_model import count_embedding_rows
from nested_core.models.parameters import ParameterRefs, read_parameters
from nested_core.optim.named_updates import flatten
from nested_core.rooms.memory.peak_estimate import LayerFootprint, ModelFootprint
from nested_core.training.loss.logit_budget import positions_at_once
from nested_core.training.loss.loss_interface import Loss

if TYPE_CHECKING:
    from nested_core.config.schema import FineTuneConfig

MASTER_BYTES = 4  # float32
EXPERT_LINEAR_CLASSES = ("SwitchLinear", "QuantizedSwitchLinear")  # mlx_lm.models.switch_layers
LINEAR_CLASSES = ("Linear", "QuantizedLinear", *EXPERT_LINEAR_CLASSES)
ATTENTION_OUTPUT_LAYERS = ("o_proj", "out_proj", "dense", "wo")
MLP_OUTPUT_LAYERS = ("down_proj", "w2", "fc2", "dense_4h_to_h")
# Their inputs are made by attention and MLP.
OUTPUT_LAYERS = ATTENTION_OUTPUT_LAYERS + MLP_OUTPUT_LAYERS
GATE_AND_UP_LAYERS = ("gate_proj", "up_proj")  # whose product down_proj reads
HEAD_COUNT_ATTRIBUTES = ("n_heads", "num_heads", "num_attention_heads")
EXPERTS_PER_TOKEN_ATTRIBUTES = ("top_k", "num_experts_per_tok")
# Of a gated delta net: of queries, keys and values the convolution's output and its silu, of
# queries and keys their norms, and of values the rule's output and its norm are kept.
DELTA_NET_WIDTH_ATTRIBUTES = ("conv_dim", "key_dim", "value_dim")
ARRAYS_KEPT_OF_A_DELTA_NET_WIDTH = 2
GEGLU_MLP_CLASSES = gemma2.MLP, gemma3_text.MLP
# Of the MLP's inner width. On CUDA gelu(gate) up is recomputed, but a Gemma's peak is as if not.
ARRAYS_KEPT_OF_A_GELU = 3

Modules = Mapping[str, Any]


def compute_footprint(
    config: FineTuneConfig, model: nn.Module, refs: ParameterRefs, optimizer: Optimizer, loss: Loss
) -> ModelFootprint:
    """Compute the bytes that the model, its trained parameters and the optimizer's state take.

    Also returns the shapes of what the layers keep in a step, from which `peak_estimate` forecasts
    the peak. Nothing is run.
    """
    modules = dict(model.named_modules())
    activation_bytes = bytes_per_activation(modules.values(), refs)
    factor_bytes = max(ref.dtype.size for ref in refs.values())
    vocabulary = count_embedding_rows(model) or 0
    return ModelFootprint(
        weights=sum(value.nbytes for m in modules.values() for value in own_arrays(m).values()),
        trained=MASTER_BYTES * sum(value.size for value in read_parameters(refs).values()),
        moments=sum(value.nbytes for value in flatten(optimizer.state).values()),
        activation_bytes=activation_bytes,
        layers=read_layer_footprints(
            model,
            modules,
            uses_dropout=config.lora_parameters.dropout > 0,
            # A layer's input is converted to the factors' dtype if that is wider
            input_copies=max(1, factor_bytes // activation_bytes),
        ),
        vocabulary=vocabulary,
        chunk_rows=positions_at_once(vocabulary) if loss.is_chunked else None,
        is_packed=config.fine_tune_type != "full",  # the factors of LoRA are small arrays
        dequantized=max(map(dequantized_weight_bytes, modules.values()), default=0),
    )


def bytes_per_activation(modules: Iterable[nn.Module], refs: ParameterRefs) -> int:
    """Return bytes of an activation: of the dtype of most frozen arrays, else of trained ones."""
    trained = {(id(ref.module), ref.key) for ref in refs.values()}
    frozen = [v for m in modules for key, v in own_arrays(m).items() if (id(m), key) not in trained]
    dtypes = Counter(v.dtype for v in frozen if mx.issubdtype(v.dtype, mx.floating))
    if dtypes:
        return dtypes.most_common(1)[0][0].size
    return max((ref.dtype.size for ref in refs.values()), default=4)


def own_arrays(module: nn.Module) -> dict[str, mx.array]:
    """Return the arrays of a module itself, without those of its submodules."""
    return {key: value for key, value in module.items() if isinstance(value, mx.array)}


def read_layer_footprints(
    model: nn.Module, modules: Modules, *, uses_dropout: bool = False, input_copies: int = 1
) -> tuple[LayerFootprint, ...]:
    """Return the footprints of a model's layers, in their order.

    Args:
        model: a model with a list of `layers`.
        modules: all of its modules by dotted name.
        uses_dropout: whether the adapter has dropout, which keeps each input and its mask.
        input_copies: how often an input is kept: the size of the factors' dtype, in its own.
    """
    names = {id(module): name for name, module in modules.items()}
    layers: dict[str, dict[str, Any]] = {names.get(id(layer), ""): {} for layer in model.layers}
    depth = next(iter(layers), "").count(".") + 1
    for name, module in modules.items():
        parts = name.split(".", depth)
        layer = ".".join(parts[:depth])
        if len(parts) > depth and layer in layers:
            layers[layer][parts[depth]] = module
    if uses_dropout:
        input_copies += 1
    return tuple(_layer_footprint(each, uses_dropout, input_copies) for each in layers.values())


def _layer_footprint(modules: Modules, uses_dropout: bool, input_copies: int) -> LayerFootprint:
    linears = {name: widths for name in modules if (widths := _linear_widths(modules, name))}
    inner = {name: name.rpartition(".")[2] in OUTPUT_LAYERS for name in linears}
    trained = [name for name in linears if _is_trained(modules[name])]
    inputs = {}  # layers that read the same array have one key; with dropout each has its own
    for name in trained:
        parent, width = name.rpartition(".")[0], linears[name][0]
        inputs[name if uses_dropout else "", parent, width, inner[name]] = width
    outputs = sum(
        output
        for name, (_, output) in linears.items()
        if not inner[name] or _is_of_experts(modules[name])  # the router's weights multiply those
    )
    factors = sum(_adapter_elements_kept(modules[name], linears[name][1]) for name in trained)
    norms = [_norm_width(modules, linears, name) for name in modules]
    fused = [name for name in trained if input_copies == 1 and _ends_fused_mlp(modules, name)]
    outer_widths = [output for name, (_, output) in linears.items() if inner[name]]
    attending = [name for name in linears if name.rpartition(".")[2] in ATTENTION_OUTPUT_LAYERS]
    attentions = {name.rpartition(".")[0] for name in attending}
    return LayerFootprint(
        width=min(outer_widths, default=max(norms)),
        kept=outputs
        + input_copies * sum(inputs.values())
        + factors
        + sum(norms)
        + _elements_kept_by_delta_nets(modules)
        + _elements_kept_by_gelu(modules, linears),
        mlp_width=sum(
            w for name, (w, _) in linears.items() if name.split(".")[-1] in MLP_OUTPUT_LAYERS
        ),
        heads=_first_attribute(modules, HEAD_COUNT_ATTRIBUTES, 0),
        is_trained=bool(trained),
        mlp_product=sum(linears[name][0] for name in fused),
        attention=sum(linears[name][0] for name in attending),
        qkv=sum(
            output
            for name, (_, output) in linears.items()
            if name.rpartition(".")[0] in attentions and not inner[name]
        ),
    )


def _ends_fused_mlp(modules: Modules, name: str) -> bool:
    """Tell if a layer is the last of a gated MLP that is all LoRA, which the room `cuda` fuses."""
    parent, _, leaf = name.rpartition(".")
    code = sys.modules.get(type(modules.get(parent)).__module__)  # None: code of the model's own
    layers = [modules.get(f"{parent}.{each}") for each in (*GATE_AND_UP_LAYERS, leaf)]
    return leaf == "down_proj" and hasattr(code, "swiglu") and all(map(_lora_has_kernels, layers))


def _lora_has_kernels(module: Any) -> bool:
    return isinstance(module, LoRALinear) and has_kernel_for_rank(module.lora_b.shape[0])


def _linear_widths(modules: Modules, name: str) -> tuple[int, int] | None:
    """Return a linear layer's input and output, in elements a token; None for any other module."""
    module, parent = modules[name], modules.get(name.rpartition(".")[0])
    if parent is not None and "lora_a" in parent:
        return None  # the base of an adapter's layer: the adapter's layer counts for both
    base = _base_of(module)
    if type(base).__name__ not in LINEAR_CLASSES:
        return None
    output, width = base.weight.shape[-2:]
    if "scales" in base:
        width = width * 32 // base.bits
    if not _is_of_experts(module):
        return width, output
    experts = _first_attribute(modules, EXPERTS_PER_TOKEN_ATTRIBUTES, 1)
    return experts * width, experts * output


def _base_of(module: Any) -> Any:
    """Return the base of an adapter's layer; any other module itself."""
    return module.get("linear", module) if "lora_a" in module else module


def _is_of_experts(module: Any) -> bool:
    return type(_base_of(module)).__name__ in EXPERT_LINEAR_CLASSES


def _elements_kept_by_delta_nets(modules: Modules) -> int:
    """Count what gated delta nets keep beside their linear layers, a token."""
    total = 0
    for module in modules.values():
        widths = [vars(module).get(name) for name in DELTA_NET_WIDTH_ATTRIBUTES]
        known = [width for width in widths if isinstance(width, int)]
        total += sum(known) if len(known) == len(widths) else 0
    return ARRAYS_KEPT_OF_A_DELTA_NET_WIDTH * total


def _elements_kept_by_gelu(modules: Modules, linears: Any) -> int:
    """Count what MLX keeps of gelu(gate) * up beside both, a token."""
    mlps = [name for name, module in modules.items() if type(module) in GEGLU_MLP_CLASSES]
    widths: list[int] = [linears[f"{name}.down_proj"][0] for name in mlps]
    return ARRAYS_KEPT_OF_A_GELU * sum(widths)


def _is_trained(module: nn.Module) -> bool:
    return "lora_a" in module or bool(flatten(module.trainable_parameters()))


def _adapter_elements_kept(module: nn.Module, output: int) -> int:
    """Count what an adapter's layer keeps besides: x @ lora_a, and what DoRA multiplies."""
    if "lora_a" not in module:
        return 0
    rank: int = min(module.lora_a.shape[-2:])
    return rank + output if "m" in module else rank


def _norm_width(modules: Modules, linears: Any, name: str) -> int:
    """Return the width that a norm reads, a token; within heads it reads all of them. Else 0."""
    module = modules[name]
    if "Norm" not in type(module).__name__ or "weight" not in module:
        return 0
    _, output = linears.get(name.replace("_norm", "_proj"), (0, 0))
    return max(int(module.weight.size), int(output))


def _first_attribute(modules: Modules, names: tuple[str, ...], default: int) -> int:
    """Return the first integer attribute of one of these names that any of the modules has."""
    for module in modules.values():
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, int):
                return value
    return default


def dequantized_weight_bytes(module: Any) -> int:
    """Return the size in bytes of a quantized layer's dequantized weight; 0 for other modules."""
    is_quantized = isinstance(module, tuple(METHODS))
    if not is_quantized or not mx.issubdtype(module.scales.dtype, mx.floating):
        return 0
    output, packed = module.weight.shape
    size: int = output * packed * 32 // module.bits * module.scales.dtype.size
    return size
