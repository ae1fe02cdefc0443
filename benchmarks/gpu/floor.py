"""What a step cannot do without, by itself: the frozen layers' products, and attention.

As long as the frozen products are made in bfloat16, a step takes at least this long: `floor` bounds
what any way of computing all else could reach. MLX has cuBLAS and cuDNN compute random arrays of a
step's shapes; zeros would not do, for with them a GPU takes half the power.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.shapes import WINDOW, Shape, measure

NAME = "floor"


def floor_of(shape: Shape, *, deep: bool = False) -> dict[str, Any]:
    """Seconds of steps of nothing but products forwards, and attention and products backwards.

    With `deep`, backwards as far as [1, 2, 4] goes where deep layers are fast. The lowest layer
    that is due needs no gradient of what q, k and v are given.
    """
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

    def step(lowest: int) -> Any:
        found: Any = None
        for weights in layers:
            mx.async_eval([wide[w.shape[1]] @ w.T for w in weights])
        for _ in layers[:lowest]:
            mx.async_eval(attend(q, k, v))
        mx.async_eval(wide[shape.hidden] @ output.T)
        mx.async_eval(wide[shape.vocabulary] @ output)
        for place in reversed(range(lowest, shape.layers)):
            weights = layers[place][3:] if place == lowest else layers[place]
            found = mx.vjp(attend, [q, k, v], [g]), [wide[w.shape[0]] @ w for w in weights]
            mx.async_eval(found)
        return found

    def window() -> None:
        for lowest in lowest_layers(shape.layers, deep):
            last = step(lowest)
        mx.eval(last)

    return measure(window)


def lowest_layers(layers: int, deep: bool) -> list[int]:
    """The lowest layer that is due at each step of a window."""
    due = (1, 2, 1, 3) if deep else (3,) * WINDOW  # thirds, from the deepest on
    return [-(-layers * (3 - thirds) // 3) for thirds in due]  # as benchmarks.tiers.thirds has them


def weights_of(shape: Shape) -> list[tuple[int, int]]:
    """Outputs and inputs of a layer's seven products."""
    keys = shape.hidden // shape.heads * shape.kv_heads
    attention = [(each, shape.hidden) for each in (shape.hidden, keys, keys, shape.hidden)]
    gated = [(shape.intermediate, shape.hidden)] * 2
    return [*attention, *gated, (shape.hidden, shape.intermediate)]
