"""What a step cannot do without, by itself: the frozen layers' products, and attention.

As long as the frozen products are made in bfloat16, a step takes at least this long: `floor` bounds
what any way of computing all else could reach. MLX has cuBLAS and cuDNN compute random arrays of a
step's shapes; zeros would not do, for with them a GPU takes half the power. Products with experts
are MLX's own too, of rows sorted by expert, as many to each; in bfloat16 they are on CUDA alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.shapes import WINDOW, Shape, measure

NAME = "floor"


def floor_of(shape: Shape, *, deep: bool = False) -> dict[str, Any]:
    """Seconds of steps of nothing but products forwards, and attention and products backwards.

    With `deep`, backwards as far as [1, 2, 4] goes where deep layers are fast. The lowest layer
    that is due needs no gradient of what q, k and v are given.
    """
    import mlx.core as mx

    head, sizes = head_of(shape), weights_of(shape)
    layers = [[normal(*size, scale=0.02) for size in sizes] for _ in range(shape.layers)]
    output = normal(shape.vocabulary, shape.hidden, scale=0.02)
    products = Products(shape, [*sizes, output.shape])
    q, k, v, g = (
        normal(shape.batch, heads, shape.length, head)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=head**-0.5, mask="causal")

    def step(lowest: int) -> Any:
        found: Any = None
        for weights in layers:
            mx.async_eval([products.forward(w) for w in weights])
        for _ in layers[:lowest]:
            mx.async_eval(attend(q, k, v))
        mx.async_eval(products.forward(output))
        mx.async_eval(products.backward(output))
        for place in reversed(range(lowest, shape.layers)):
            weights = layers[place][3:] if place == lowest else layers[place]
            found = mx.vjp(attend, [q, k, v], [g]), [products.backward(w) for w in weights]
            mx.async_eval(found)
        return found

    def window() -> None:
        for lowest in lowest_layers(shape.layers, deep):
            last = step(lowest)
        mx.eval(last)

    return measure(window)


class Products:
    """Products of a step's rows with weights (outputs, inputs) or (experts, outputs, inputs)."""

    def __init__(self, shape: Shape, sizes: Sequence[Sequence[int]]) -> None:
        import mlx.core as mx

        routed = shape.tokens * shape.config.get("num_experts_per_tok", 0)
        rows = {2: (shape.tokens,), 3: (routed, 1)}
        widths = {(len(size), width) for size in sizes for width in size[-2:]}
        self._rows = {(kind, width): normal(*rows[kind], width) for kind, width in widths}
        number = shape.config.get("num_experts", 1)
        self._experts = mx.sort(mx.arange(routed, dtype=mx.uint32) % number)
        mx.eval(self._experts)

    def forward(self, weight: Any) -> Any:
        """What a layer of this weight makes of its inputs."""
        return self._multiply(self._rows[weight.ndim, weight.shape[-1]], weight.swapaxes(-1, -2))

    def backward(self, weight: Any) -> Any:
        """The gradient of the inputs, from one of the outputs."""
        return self._multiply(self._rows[weight.ndim, weight.shape[-2]], weight)

    def _multiply(self, rows: Any, weight: Any) -> Any:
        import mlx.core as mx

        if weight.ndim == 2:
            return rows @ weight
        return mx.gather_mm(rows, weight, rhs_indices=self._experts, sorted_indices=True)


def normal(*sizes: int, scale: float = 1.0) -> Any:
    """Random numbers in bfloat16, computed."""
    import mlx.core as mx

    array = (scale * mx.random.normal(sizes)).astype(mx.bfloat16)
    mx.eval(array)
    return array


def lowest_layers(layers: int, deep: bool) -> list[int]:
    """The lowest layer that is due at each step of a window."""
    due = (1, 2, 1, 3) if deep else (3,) * WINDOW  # thirds, from the deepest on
    return [-(-layers * (3 - thirds) // 3) for thirds in due]  # as benchmarks.tiers.thirds has them


def weights_of(shape: Shape) -> list[tuple[int, ...]]:
    """(outputs, inputs) of a layer's seven weights; with experts, three begin with their number."""
    config = shape.config
    attention, keys = (head_of(shape) * count for count in (shape.heads, shape.kv_heads))
    width = config.get("moe_intermediate_size", shape.intermediate)
    experts = [config["num_experts"]] if "num_experts" in config else []
    projections = [(each, shape.hidden) for each in (attention, keys, keys)]
    gated = [(*experts, width, shape.hidden)] * 2
    return [*projections, (shape.hidden, attention), *gated, (*experts, shape.hidden, width)]


def head_of(shape: Shape) -> int:
    """The width of an attention head."""
    return int(shape.config.get("head_dim", shape.hidden // shape.heads))
