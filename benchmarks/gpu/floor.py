"""What a step cannot do without, by itself: the frozen layers' products, and attention.

As long as the frozen products are made in bfloat16, a step takes at least this long: `floor` bounds
what any way of computing all else could reach. MLX has cuBLAS and cuDNN compute random arrays of a
step's shapes; zeros would not do, for with them a GPU takes half the power.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.shapes import WINDOW, Shape, measure

NAME = "floor"


def floor_of(shape: Shape) -> dict[str, Any]:
    """Seconds of steps of nothing but products forwards, and attention and products backwards."""
    import mlx.core as mx

    rows, head = shape.tokens, shape.hidden // shape.heads

    def normal(*sizes: int, scale: float = 1.0) -> mx.array:
        array = (scale * mx.random.normal(sizes)).astype(mx.bfloat16)
        mx.eval(array)
        return array

    sizes = weights_of(shape)
    layers = [[normal(*size, scale=0.02) for size in sizes] for _ in range(shape.layers)]
    output = normal(shape.vocabulary, shape.hidden, scale=0.02)
    widths = {width for size in [*sizes, output.shape] for width in size}
    wide = {width: normal(rows, width) for width in widths}
    q, k, v, g = (
        normal(shape.batch, heads, shape.length, head)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=head**-0.5, mask="causal")

    def step() -> Any:
        for weights in layers:
            mx.async_eval([wide[w.shape[1]] @ w.T for w in weights])
        mx.async_eval(wide[shape.hidden] @ output.T)
        mx.async_eval(wide[shape.vocabulary] @ output)
        found: Any = None
        for weights in reversed(layers):
            through = [wide[w.shape[0]] @ w for w in weights]
            found = mx.vjp(attend, [q, k, v], [g]), through
            mx.async_eval(found)
        return found

    def window() -> None:
        for _ in range(WINDOW - 1):
            step()
        mx.eval(step())

    return measure(window)


def weights_of(shape: Shape) -> list[tuple[int, int]]:
    """Outputs and inputs of a layer's seven products."""
    keys = shape.hidden // shape.heads * shape.kv_heads
    attention = [(each, shape.hidden) for each in (shape.hidden, keys, keys, shape.hidden)]
    gated = [(shape.intermediate, shape.hidden)] * 2
    return [*attention, *gated, (shape.hidden, shape.intermediate)]
