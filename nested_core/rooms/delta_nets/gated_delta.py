"""The gated delta rule in chunks of tokens, in place of mlx-lm's loop over tokens.

mlx-lm has a kernel for Metal, without a gradient; on CUDA, on CPUs and in training everywhere it
computes token after token, and keeps the state after each. In chunks nearly everything is a matrix
product, and only the state is carried from chunk to chunk: the WY form of Yang et al. 2024, Gated
Delta Networks (arXiv 2412.06464, section 3.3), as in flash-linear-attention's
fla/ops/gated_delta_rule/chunk.py. Gates of one value a head (Qwen3-Next, Qwen3.5, OLMo hybrid) and
of one for each element of a key (Kimi Linear, arXiv 2510.26692; Kimi K3, Bailing) differ in
`_decayed_products` alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta

from nested_core import backend
from nested_core.kernels.device_operations import device_operations
from nested_core.kernels.patching import modules_of_code, replacing_function
from nested_core.kernels.self_check import checked_kernel, random_arrays

PATCHED_FUNCTION_NAME = "gated_delta_update"
CHUNK_SIZES = {"gpu": 64, "cpu": 16}  # tokens of a chunk, powers of two
LARGEST_UNSPLIT_MATRIX = 16

plain_gated_delta_update: Any = gated_delta.gated_delta_update


class DeltaRule(NamedTuple):
    """What the rule S <- exp(log_decay) S; S <- S + beta (v - S k) k^T; y = S q is applied to.

    q, k: queries and keys [batch, length, key heads, key width].
    v: values [batch, length, value heads, value width]; consecutive heads share a key head.
    log_decay: at most 0, [batch, length, value heads], or with one for each element of the key
        [batch, length, value heads, key width].
    beta: which part of the difference is written [batch, length, value heads].
    state: S before the first token [batch, value heads, value width, key width].
    """

    q: mx.array
    k: mx.array
    v: mx.array
    log_decay: mx.array
    beta: mx.array
    state: mx.array


def compute_in_chunks(
    rule: DeltaRule, *, chunk_size: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Return outputs [batch, length, value heads, value width], in q's dtype, and the last state.

    Only the arguments are kept for the backward pass, which computes the rest again. A decay is a
    difference of sums over a chunk: with sums down to -G it is right within G units in its last
    place.

    Args:
        rule: the arrays; the state is carried in its own dtype.
        chunk_size: the tokens of a chunk, a power of two.
        dtype: of the factors of matrix products.
    """
    batch, length, key_heads, _ = rule.k.shape
    missing = -length % chunk_size  # tokens that write nothing, and do not decay

    def in_chunks(x: mx.array) -> mx.array:
        """Reshape to (chunks, batch, key heads, value heads of each or 1, chunk size, width)."""
        if missing:
            x = mx.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)])
        split = x.reshape(batch, -1, chunk_size, key_heads, x.shape[2] // key_heads, x.shape[3])
        return split.transpose(1, 0, 3, 4, 2, 5)

    def compute(*arrays: mx.array) -> list[mx.array]:
        """Return the outputs and the last state, of the arguments of the update in their order."""
        q, k, v, log_decay, beta, state = arrays
        log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        carried = mx.unflatten(state.swapaxes(-1, -2), 1, (key_heads, -1))
        chunked = DeltaRule(
            in_chunks(q),
            in_chunks(k),
            in_chunks(v),
            in_chunks(log_decay),
            in_chunks(beta[..., None]),
            carried,
        )
        y, last = _compute_chunks(chunked, dtype)
        y = y.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, *v.shape[2:])
        return [y[:, :length].astype(q.dtype), last.flatten(1, 2).swapaxes(-1, -2)]

    y, last = mx.checkpoint(compute)(*rule)
    return y, last


def _compute_chunks(rule: DeltaRule, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Return the rule for arrays in chunks, and a state whose values are its columns.

    With G the logarithm of the decay since the chunk began, S the state then, and A the strictly
    lower part of beta_i exp(G_i - G_j) k_i k_j^T, the tokens write (I + A)^-1 beta (v - exp(G) k S)
    = U - W S. The state becomes exp(G_last) S + K^T (U - W S), and the output is exp(G) q S + P (U
    - W S), with K = exp(G_last - G) k and P = exp(G_i - G_j) q_i k_j^T for j <= i.
    """
    q, k = mx.contiguous(rule.q.astype(dtype)), mx.contiguous(rule.k.astype(dtype))
    total = mx.cumsum(rule.log_decay.astype(rule.state.dtype), axis=-2)
    last = total[..., -1:, :]
    beta = rule.beta.astype(total.dtype)
    decay = mx.exp(total)
    p, overlaps = _decayed_products(q, k, total)
    below_diagonal = mx.where(_lower_triangle(k.shape[-2], -1), beta * overlaps, 0)
    inverse = cast(mx.array, _invert_unit_lower(below_diagonal))
    scaled = (inverse * beta.swapaxes(-1, -2)).astype(dtype)
    w = scaled @ (decay * k).astype(dtype)
    u = scaled @ mx.contiguous(rule.v.astype(dtype))
    keys = (mx.exp(last - total) * k).astype(dtype).swapaxes(-1, -2)
    states, state = cast(
        tuple[mx.array, mx.array],
        _carry_state(mx.exp(last).swapaxes(-1, -2), keys @ w, keys @ u, rule.state),
    )
    p = p.astype(dtype)
    return mx.addmm(p @ u, (decay * q - p @ w).astype(dtype), states), state


def _lower_triangle(size: int, diagonal: int) -> mx.array:
    return mx.tri(size, k=diagonal, dtype=mx.bool_)


def _decayed_products(q: mx.array, k: mx.array, total: mx.array) -> tuple[mx.array, mx.array]:
    """Return the lower triangles of exp(G_i - G_j) q_i k_j^T and of exp(G_i - G_j) k_i k_j^T."""
    if total.shape[-1] > 1:
        q, k = mx.broadcast_to(q, total.shape), mx.broadcast_to(k, total.shape)
        p, overlaps = _halved_products(mx.stack([q, k]), k, total)
        return p, overlaps
    transposed = k.swapaxes(-1, -2)
    visible = _lower_triangle(k.shape[-2], 0)
    decay = mx.exp(mx.where(visible, total - total.swapaxes(-1, -2), -mx.inf))
    return decay * (q @ transposed), decay * (k @ transposed)


def _halved_products(x: mx.array, k: mx.array, total: mx.array) -> mx.array:
    """Return the lower triangle of sum_d exp(G_id - G_jd) x_id k_jd, without a positive exponent.

    Between the halves of a block the decay is split at the end of the first one, so that both
    factors are at most 1 (Yang et al. 2023, arXiv 2312.06635, section 4.3, has such blocks).
    """
    half = k.shape[-2] // 2
    if half == 0:
        return (x.astype(total.dtype) * k).sum(axis=-1, keepdims=True)
    middle = total[..., half - 1 : half, :]
    below = (x[..., half:, :] * mx.exp(total[..., half:, :] - middle)).astype(x.dtype)
    above = (k[..., :half, :] * mx.exp(middle - total[..., :half, :])).astype(k.dtype)
    halves = [mx.unflatten(each, -2, (2, half)) for each in (x, k, total)]
    return _assemble(_halved_products(*halves), below @ above.swapaxes(-1, -2))


def _assemble(diagonal: mx.array, corner: mx.array) -> mx.array:
    """Lower triangular matrices of the blocks on their diagonal (..., 2, n, n) and the corner."""
    first, second = diagonal[..., 0, :, :], diagonal[..., 1, :, :]
    above = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
    below = mx.concatenate([corner.astype(first.dtype), second], axis=-1)
    return mx.concatenate([above, below], axis=-2)


def invert_in_mlx(a: mx.array) -> mx.array:
    """Invert I + a of strictly lower triangular matrices a (..., n, n), n a power of two.

    [[L, 0], [X, M]]^-1 = [[L^-1, 0], [-M^-1 X L^-1, M^-1]], for ever larger blocks. Powers of `a`,
    which take as many products, grow out of bounds where keys are alike.
    """
    size = a.shape[-1]
    if size > LARGEST_UNSPLIT_MATRIX:
        half = size // 2
        inverses = invert_in_mlx(mx.stack([a[..., :half, :half], a[..., half:, half:]], axis=-3))
        first, second = inverses[..., 0, :, :], inverses[..., 1, :, :]
        return _assemble(inverses, -(second @ (a[..., half:, :half] @ first)))
    inverse = mx.broadcast_to(mx.eye(size, dtype=a.dtype), a.shape)
    index = mx.arange(size)
    for exponent in range(size.bit_length() - 1):
        block = index >> exponent
        is_corner = (block[:, None] == block + 1) & (block % 2 == 0)
        corners = mx.where(is_corner, a, 0)
        inverse = inverse - (corners if exponent == 0 else inverse @ (corners @ inverse))
    return inverse


@mx.custom_function
def _invert_unit_lower(a: mx.array) -> Any:
    """Compute (I + a)^-1, by a kernel if one takes it."""
    inverse = device_operations().invert_unit_lower(a)
    return invert_in_mlx(a) if inverse is None else inverse


@_invert_unit_lower.vjp
def _invert_unit_lower_vjp(a: mx.array, cotangent: mx.array, inverse: mx.array) -> Any:
    transposed = inverse.swapaxes(-1, -2)
    return -(transposed @ cotangent @ transposed)


def carry_in_mlx(
    decay: mx.array, erased: mx.array, written: mx.array, state: mx.array, direction: int = 1
) -> list[mx.array]:
    """Compute S before each chunk, in `written`'s dtype, and the last S: S <- decay S + R - E S.

    R is `written` and E `erased`, of each chunk; its decay is (..., key width or 1, 1).
    With direction -1 it goes from the last chunk to the first.
    """
    states = []
    for chunk in range(len(written))[::direction]:
        states.append(state.astype(written.dtype))
        change = mx.addmm(written[chunk], erased[chunk], states[-1], alpha=-1.0)
        state = decay[chunk] * state + change
    return [mx.stack(states[::direction]), state]


def _carry(
    decay: mx.array, erased: mx.array, written: mx.array, state: mx.array, direction: int
) -> list[mx.array]:
    """Return the states by a kernel where one takes the arrays."""
    states = device_operations().carry_states(decay, erased, written, state, direction)
    return carry_in_mlx(decay, erased, written, state, direction) if states is None else states


@mx.custom_function
def _carry_state(decay: mx.array, erased: mx.array, written: mx.array, state: mx.array) -> Any:
    """Compute `carry_in_mlx`, differentiably."""
    return _carry(decay, erased, written, state, direction=1)


@_carry_state.vjp
def _carry_state_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    """Do the same backwards, E transposed; dR is the gradient after a chunk, and dE -dR S^T.

    A decay's gradient, the sum of dR S over its rows, is in the diagonal of dE.
    """
    decay, erased, _, _ = primals
    d_states, d_state = cotangents
    d_written, d_state = _carry(decay, erased.swapaxes(-1, -2), d_states, d_state, direction=-1)
    d_erased = -(d_written @ outputs[0].swapaxes(-1, -2))
    diagonal = d_erased.flatten(-2)[..., :: d_erased.shape[-1] + 1]
    d_decay = -diagonal[..., None].astype(decay.dtype)
    if decay.shape[-2] == 1:
        d_decay = d_decay.sum(axis=-2, keepdims=True)
    return d_decay, d_erased, d_written, d_state


def compute_by_tokens(*rule: mx.array) -> tuple[mx.array, mx.array]:
    """Return the arrays of a `DeltaRule` by mlx-lm's loop."""
    q, k, v, log_decay, beta, state = rule
    y, last = gated_delta.gated_delta_ops(q, k, v, mx.exp(log_decay), beta, state)
    return y, last


def _example_rules() -> list[DeltaRule]:
    """Make rows that chunks do not divide, two value heads to a key head; gates of both kinds."""
    keys, values = (2, 150, 2, 32), (2, 150, 4, 32)
    q, k, v, gates, beta = random_arrays(keys, keys, values, values, values[:3])
    q, k = gated_delta.normalize_qk(q, k, inv_scale=32**-0.5, eps=1e-6)
    log_decay = -nn.softplus(gates.astype(mx.float32))
    beta, state = mx.sigmoid(beta), mx.ones((2, 4, 32, 32))
    return [DeltaRule(q, k, v, each, beta, state) for each in (log_decay[..., 0], log_decay)]


@checked_kernel("gated delta nets", reference=compute_by_tokens, examples=_example_rules)
def compute_on_this_device(*rule: mx.array) -> tuple[mx.array, mx.array]:
    """Compute a `DeltaRule` in chunks of the device's size, on a GPU in bfloat16 as given."""
    device, v = backend.device(), rule[2]
    dtype = mx.bfloat16 if device == "gpu" and v.dtype == mx.bfloat16 else mx.float32
    return compute_in_chunks(DeltaRule(*rule), chunk_size=CHUNK_SIZES[device], dtype=dtype)


def gated_delta_update(  # noqa: PLR0917 -- mlx-lm calls it with its own function's arguments
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """Compute mlx-lm's gated_delta_update in chunks; arguments as there.

    A row that goes on from a state, as in generation, is computed by mlx-lm, and so is all that its
    kernel for Metal computes. Outputs of masked tokens differ from mlx-lm's; nothing reads them.
    """
    if state is not None or (use_kernel and mx.metal.is_available()):
        plain: tuple[mx.array, mx.array] = plain_gated_delta_update(
            q,
            k,
            v,
            a,
            b,
            A_log,
            dt_bias,
            state,
            mask,
            use_kernel=use_kernel,
            lower_bound=lower_bound,
            allow_neg_eigval=allow_neg_eigval,
        )
        return plain
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        log_decay = -rate * nn.softplus(a + dt_bias)
    else:
        log_decay = lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))
    beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
    if mask is not None:
        beta = mx.where(mask[..., None], beta, 0)
        log_decay = mx.where(mx.expand_dims(mask, range(2, log_decay.ndim)), log_decay, 0)
    state = mx.zeros((v.shape[0], *v.shape[2:], k.shape[-1]), dtype=mx.float32)
    return compute_on_this_device(q, k, v, log_decay, beta, state)


def using_chunked_gated_delta_rule(model: nn.Module) -> AbstractContextManager[None]:
    """Compute a model's gated delta nets in chunks while the block runs."""
    users = modules_of_code(model, PATCHED_FUNCTION_NAME, plain_gated_delta_update)
    needs_check = backend.device() == "gpu"  # Metal too, where it was never run
    if not users or (needs_check and not compute_on_this_device.agrees_with_reference()):
        return nullcontext()
    return replacing_function(
        model, PATCHED_FUNCTION_NAME, plain_gated_delta_update, gated_delta_update
    )
