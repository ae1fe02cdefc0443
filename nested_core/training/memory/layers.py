"""What each layer of a loaded model keeps for the backward pass, read from its modules' shapes.

Nothing is computed. Modules are known by mlx-lm's names; what others keep is not seen.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from nested_core.kernels.cuda.tiles import is_in_tiles
from nested_core.kernels.quantized_linear import CALLS
from nested_core.models.parameters import ParameterRefs
from nested_core.optim.pytree import flatten
from nested_core.training.memory.estimate import Layer

SWITCHED = ("SwitchLinear", "QuantizedSwitchLinear")  # mlx_lm.models.switch_layers
LINEAR = ("Linear", "QuantizedLinear", *SWITCHED)
OUT = ("o_proj", "out_proj", "dense", "wo")  # read what attention made of its inputs
DOWN = ("down_proj", "w2", "fc2", "dense_4h_to_h")  # read what the MLP made of its inputs
GATED = ("gate_proj", "up_proj")  # whose product down_proj reads
HEADS = ("n_heads", "num_heads", "num_attention_heads")
CHOSEN = ("top_k", "num_experts_per_tok")

Modules = Mapping[str, Any]


def item_bytes(modules: Iterable[nn.Module], refs: ParameterRefs) -> int:
    """Bytes of an activation: of the dtype that most frozen arrays have, else the trained ones."""
    own = {(id(ref.module), ref.key) for ref in refs.values()}
    frozen = [v for m in modules for key, v in arrays(m).items() if (id(m), key) not in own]
    usual = Counter(v.dtype for v in frozen if mx.issubdtype(v.dtype, mx.floating))
    return next((dtype.size for dtype, _ in usual.most_common(1)), _trained_bytes(refs))


def arrays(module: nn.Module) -> dict[str, mx.array]:
    """The arrays that a module holds itself."""
    return {key: value for key, value in module.items() if isinstance(value, mx.array)}


def whole_bytes(module: Any) -> int:
    """Bytes of a quantised weight that is made whole for its products; 0 of any other module's."""
    is_quantized = isinstance(module, tuple(CALLS))
    if not is_quantized or not mx.issubdtype(module.scales.dtype, mx.floating):
        return 0
    output, packed = module.weight.shape
    size: int = output * packed * 32 // module.bits * module.scales.dtype.size
    return size


def _trained_bytes(refs: ParameterRefs) -> int:
    return max((ref.dtype.size for ref in refs.values()), default=4)


def read_layers(
    model: nn.Module, modules: Modules, *, draws: bool = False, copies: int = 1
) -> tuple[Layer, ...]:
    """The layers of a model, in their order; `modules` are all of its modules by name.

    `draws` is for an adapter with dropout, which keeps each input and what it is multiplied by;
    `copies` is how often an input is kept: as often as the factors' dtype is wider than its own.
    """
    names = {id(module): name for name, module in modules.items()}
    own: dict[str, dict[str, Any]] = {names.get(id(layer), ""): {} for layer in model.layers}
    depth = next(iter(own), "").count(".") + 1
    for name, module in modules.items():
        parts = name.split(".", depth)
        if len(parts) > depth and (layer := ".".join(parts[:depth])) in own:
            own[layer][parts[depth]] = module
    return tuple(_read_layer(each, draws, copies + draws) for each in own.values())


def _read_layer(modules: Modules, draws: bool, copies: int) -> Layer:
    linears = {name: widths for name in modules if (widths := _widths(modules, name))}
    inner = {name: name.rpartition(".")[2] in OUT + DOWN for name in linears}
    trained = [name for name in linears if _is_trained(modules[name])]
    inputs = {_input_of(name, linears, inner, draws): linears[name][0] for name in trained}
    outputs = sum(output for name, (_, output) in linears.items() if not inner[name])
    factors = sum(_own_widths(modules[name], linears[name][1]) for name in trained)
    norms = [_norm_width(modules, linears, name) for name in modules]
    return Layer(
        width=min((out for name, (_, out) in linears.items() if inner[name]), default=max(norms)),
        kept=outputs + copies * sum(inputs.values()) + factors + sum(norms),
        gated=sum(n_in for name, (n_in, _) in linears.items() if name.rpartition(".")[2] in DOWN),
        heads=_attribute(modules, HEADS, 0),
        is_trained=bool(trained),
        remade=0 if copies > 1 else sum(linears[n][0] for n in trained if _is_fused(modules, n)),
    )


def _is_fused(modules: Modules, name: str) -> bool:
    """Whether a layer is the last of a gated MLP that is all LoRA: see kernels/fused_mlp.py."""
    parent, _, leaf = name.rpartition(".")
    home = sys.modules.get(type(modules.get(parent)).__module__)  # None: code of the model's own
    layers = [modules.get(f"{parent}.{each}") for each in (*GATED, leaf)]
    return leaf == "down_proj" and hasattr(home, "swiglu") and all(map(_is_tiled, layers))


def _is_tiled(module: Any) -> bool:
    return isinstance(module, LoRALinear) and is_in_tiles(module.lora_b.shape[0])


def _input_of(name: str, linears: Any, inner: Any, draws: bool) -> tuple[Any, ...]:
    """What tells a linear layer's input from others'; dropout makes each layer one of its own."""
    return name if draws else "", name.rpartition(".")[0], linears[name][0], inner[name]


def _widths(modules: Modules, name: str) -> tuple[int, int] | None:
    """A linear layer's input and output, in elements a token; None for any other module."""
    module, parent = modules[name], modules.get(name.rpartition(".")[0])
    if parent is not None and "lora_a" in parent:
        return None  # the base of an adapter's layer, which stands for both
    base = module.get("linear", module) if "lora_a" in module else module
    kind = type(base).__name__
    if kind not in LINEAR:
        return None
    times = _attribute(modules, CHOSEN, 1) if kind in SWITCHED else 1
    output, width = base.weight.shape[-2:]
    width = width * 32 // base.bits if "scales" in base else width
    return times * width, times * output


def _is_trained(module: nn.Module) -> bool:
    return "lora_a" in module or bool(flatten(module.trainable_parameters()))


def _own_widths(module: nn.Module, output: int) -> int:
    """What an adapter's layer keeps of its own: x @ lora_a, and what DoRA's magnitudes multiply."""
    if "lora_a" not in module:
        return 0
    rank: int = min(module.lora_a.shape[-2:])
    return rank + (output if "m" in module else 0)


def _norm_width(modules: Modules, linears: Any, name: str) -> int:
    """The width that a norm reads, a token: of a norm of heads, that of all heads; else 0."""
    module = modules[name]
    if "Norm" not in type(module).__name__ or "weight" not in module:
        return 0
    _, output = linears.get(name.replace("_norm", "_proj"), (0, 0))
    return max(int(module.weight.size), int(output))


def _attribute(modules: Modules, names: tuple[str, ...], default: int) -> int:
    """The first attribute of one of these names that a module has."""
    for module in modules.values():
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, int):
                return value
    return default
