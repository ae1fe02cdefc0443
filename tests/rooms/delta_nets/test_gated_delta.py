"""The gated delta rule in chunks against a loop over tokens in float64 and against mlx-lm's."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from mlx_lm.models import gated_delta as mlx_lms
from mlx_lm.models import qwen3_5

from nested_core import backend
from nested_core.backend import to_float
from nested_core.rooms.delta_nets import gated_delta
from nested_core.rooms.delta_nets.gated_delta import DeltaRule, compute_by_tokens, compute_in_chunks
from tests.architectures import build

Arrays = list[npt.NDArray[np.float64]]
NAMES = ["outputs", "last state", "q", "k", "v", "log_decay", "beta", "state"]
WIDTH = 6  # of keys; values are one narrower
DECAYS = ["a head", "a key element"]


def example(length: int, heads: int, decay: str) -> Arrays:
    """q, k, v, log_decay, beta and state, with two key heads; some tokens forget nearly all."""
    random = np.random.default_rng(length)
    q, k = random.normal(size=(2, 2, length, 2, WIDTH))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = random.normal(size=(2, length, heads, WIDTH - 1))
    shape = (2, length, heads) if decay == DECAYS[0] else (2, length, heads, WIDTH)
    log_decay = -np.exp(2 * random.normal(size=shape))
    beta = 2 * random.random((2, length, heads))  # up to 2: OLMo hybrid's
    return [q, k, v, log_decay, beta, random.normal(size=(2, heads, WIDTH - 1, WIDTH))]


def loop_over_tokens(arrays: Arrays, d_y: Any, d_last: Any) -> Arrays:
    """Outputs, last state and all gradients, token by token, by hand."""
    heads = arrays[2].shape[2]
    q, k = (np.repeat(x, heads // 2, axis=2) for x in arrays[:2])
    v, log_decay, beta, state = arrays[2:]
    decay = np.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])[..., None, :]
    states, ys = [state], []
    for t in range(q.shape[1]):
        state = decay[:, t] * state
        missing = v[:, t] - np.einsum("bhvk,bhk->bhv", state, k[:, t])
        state = state + (beta[:, t, :, None] * missing)[..., None] * k[:, t, :, None]
        ys.append(np.einsum("bhvk,bhk->bhv", state, q[:, t]))
        states.append(state)
    d_q, d_k, d_v, d_beta = (np.zeros_like(x) for x in (q, k, v, beta))
    d_decay = np.zeros((*q.shape[:3], 1, WIDTH))
    ds = d_last
    for t in reversed(range(q.shape[1])):
        decayed = decay[:, t] * states[t]
        missing = v[:, t] - np.einsum("bhvk,bhk->bhv", decayed, k[:, t])
        written = beta[:, t, :, None] * missing
        ds = ds + d_y[:, t, ..., None] * q[:, t, :, None]
        d_q[:, t] = np.einsum("bhvk,bhv->bhk", states[t + 1], d_y[:, t])
        d_written = np.einsum("bhvk,bhk->bhv", ds, k[:, t])
        d_v[:, t] = beta[:, t, :, None] * d_written
        d_k[:, t] = np.einsum("bhvk,bhv->bhk", ds, written)
        d_k[:, t] -= np.einsum("bhvk,bhv->bhk", decayed, d_v[:, t])
        d_beta[:, t] = (d_written * missing).sum(-1)
        ds = ds - d_v[:, t, ..., None] * k[:, t, :, None]
        d_decay[:, t, :, 0] = (ds * states[t]).sum(-2)
        ds = decay[:, t] * ds
    d_log_decay = (d_decay * decay)[..., 0, :]
    if log_decay.ndim == 3:
        d_log_decay = d_log_decay.sum(-1)
    d_q, d_k = (x.reshape(*x.shape[:2], 2, -1, WIDTH).sum(3) for x in (d_q, d_k))
    return [np.stack(ys, 1), states[-1], d_q, d_k, d_v, d_log_decay, d_beta, ds]


def cotangents(arrays: Arrays) -> Arrays:
    random = np.random.default_rng(1)
    return [random.normal(size=arrays[2].shape), random.normal(size=arrays[5].shape)]


def outputs_and_gradients(function: Any, arrays: Any, gradients: Any) -> list[mx.array]:
    outputs, found = mx.vjp(lambda *given: list(function(*given)), arrays, gradients)
    return [*outputs, *found]


def relative_errors(found: Any, expected: Any) -> dict[str, float]:
    """Of each array, the norm of the difference relative to the expected norm."""
    pairs = zip(NAMES, found, expected, strict=True)
    return {
        name: float(np.linalg.norm(np.array(a) - np.array(b)) / np.linalg.norm(np.array(b)))
        for name, a, b in pairs
    }


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (8, 8), (23, 8), (37, 16), (33, 32)])
def test_in_float64_chunks_give_the_outputs_and_gradients_of_a_loop_over_tokens(
    length: int, chunk: int, heads: int, decay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = mx.array(math.e, mx.float64)
    monkeypatch.setattr(mx, "exp", lambda x: mx.power(base, x))  # MLX's has single precision here
    arrays = example(length, heads, decay)
    gradients = cotangents(arrays)

    def rule(*given: mx.array) -> Any:
        return compute_in_chunks(DeltaRule(*given), chunk_size=chunk, dtype=mx.float64)

    with mx.stream(mx.cpu):
        given, d = ([mx.array(x, mx.float64) for x in each] for each in (arrays, gradients))
        found = outputs_and_gradients(rule, given, d)
        mx.eval(found)
    expected = loop_over_tokens(arrays, *gradients)
    errors = relative_errors(found, expected)
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.slow("compiles the largest kernels")
@pytest.mark.parametrize("decay", DECAYS)
def test_compiled_in_float32_chunks_are_as_close_as_rounding_allows(decay: str) -> None:
    """The decay between two tokens is a difference of sums, here down to -600."""
    arrays = example(75, 4, decay)
    gradients = cotangents(arrays)
    given, d = ([mx.array(x, mx.float32) for x in each] for each in (arrays, gradients))
    for chunk in (16, 64):

        def rule(*given: mx.array, chunk: int = chunk) -> Any:
            return compute_in_chunks(DeltaRule(*given), chunk_size=chunk, dtype=mx.float32)

        found = mx.compile(lambda *given, rule=rule: outputs_and_gradients(rule, given, d))(*given)
        errors = relative_errors(found, loop_over_tokens(arrays, *gradients))
        assert max(errors.values()) < 3e-5, errors


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_bfloat16_inputs_give_bfloat16_outputs_and_a_float32_state(dtype: mx.Dtype) -> None:
    arrays = example(75, 4, DECAYS[0])
    arrays[4] /= 2
    gradients = cotangents(arrays)
    dtypes = [*[mx.bfloat16] * 3, mx.float32, mx.bfloat16, mx.float32]
    given = [mx.array(x).astype(each) for x, each in zip(arrays, dtypes, strict=True)]
    d = [mx.array(x).astype(each) for x, each in zip(gradients, dtypes[2::3], strict=True)]
    exact = loop_over_tokens(
        [np.array(x.astype(mx.float32), np.float64) for x in given],
        *(np.array(x.astype(mx.float32), np.float64) for x in d),
    )

    def rule(*given: mx.array) -> Any:
        return compute_in_chunks(DeltaRule(*given), chunk_size=64, dtype=dtype)

    found, plain = (outputs_and_gradients(each, given, d) for each in (rule, compute_by_tokens))
    assert [x.dtype for x in found] == [mx.bfloat16, mx.float32, *dtypes]
    ours, theirs = (
        relative_errors([x.astype(mx.float32) for x in each], exact) for each in (found, plain)
    )
    if dtype == mx.float32:
        assert all(ours[name] <= 1.01 * theirs[name] + 1e-5 for name in NAMES), (ours, theirs)
    assert max(ours.values()) < 0.008, ours


def test_equal_keys_that_are_never_forgotten_stay_exact() -> None:
    """Powers of the matrix that is inverted would have elements up to 1e17."""
    arrays = example(128, 2, DECAYS[0])
    arrays[1] = np.broadcast_to(arrays[1][:, :1], arrays[1].shape)
    arrays[3], arrays[4] = 0 * arrays[3], 0 * arrays[4] + 1
    given = [mx.array(x, mx.float32) for x in arrays]
    y, last = compute_in_chunks(DeltaRule(*given), chunk_size=64, dtype=mx.float32)
    expected = loop_over_tokens(arrays, *cotangents(arrays))
    assert np.abs(np.array(y) - expected[0]).max() < 1e-5 * np.abs(expected[0]).max()
    assert np.abs(np.array(last) - expected[1]).max() < 1e-5 * np.abs(expected[1]).max()


def test_the_backward_pass_keeps_the_arguments_and_not_the_states() -> None:
    """mlx-lm's loop keeps the state after every token, here 512 of 64 KiB, several times."""
    mx.random.seed(0)
    q, k, v = (mx.random.normal((1, 512, 1, 128)) / 12 for _ in range(3))
    log_decay, beta = -mx.ones((1, 512, 1)), 0.5 * mx.ones((1, 512, 1))
    given = [q, k, v, log_decay, beta, mx.zeros((1, 1, 128, 128))]

    def total(*given: mx.array) -> mx.array:
        y, _ = compute_in_chunks(DeltaRule(*given), chunk_size=64, dtype=mx.float32)
        return y.sum()

    mx.eval(given)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(total, argnums=(0, 1, 2, 3, 4))(*given))
    assert mx.get_peak_memory() - before < 12 * 2**20


def delta_net_arguments(decay: str, masked: int = 0) -> dict[str, Any]:
    """Arguments of mlx-lm's gated_delta_update; the last tokens of the second row are masked."""
    mx.random.seed(0)
    q, k = (mx.random.normal((2, 21, 2, 32)) for _ in range(2))
    q, k = mlx_lms.normalize_qk(q, k, inv_scale=32**-0.5, eps=1e-6)
    gates = (4,) if decay == DECAYS[0] else (4, 32)
    return {
        "q": q,
        "k": k,
        "v": mx.random.normal((2, 21, 4, 32)),
        "a": mx.random.normal((2, 21, *gates)),
        "b": mx.random.normal((2, 21, 4)),
        "A_log": mx.random.normal((4,) if decay == DECAYS[0] else (4, 1)),
        "dt_bias": mx.random.normal(gates),
        "mask": mx.arange(21) < mx.array([[21], [21 - masked]]) if masked else None,
    }


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(
    "settings", [{}, {"lower_bound": -5.0}, {"allow_neg_eigval": True}], ids=str
)
@pytest.mark.parametrize("masked", [0, 5])
def test_the_update_is_mlx_lms_for_every_kind_of_gate_and_mask(masked, settings, decay) -> None:
    arguments = delta_net_arguments(decay, masked)
    mask = arguments.pop("mask")
    names = list(arguments)
    read = mx.ones((2, 21, 1, 1)) if mask is None else mask[..., None, None]

    def of(update: Any) -> Any:
        def run(*arrays: mx.array) -> list[mx.array]:
            y, last = update(**dict(zip(names, arrays, strict=True)), mask=mask, **settings)
            return [mx.where(read, y, 0), last]  # nothing reads the outputs of masked tokens

        outputs = run(*arguments.values())
        return outputs + mx.vjp(run, list(arguments.values()), outputs)[1]

    found, expected = of(gated_delta.gated_delta_update), of(mlx_lms.gated_delta_update)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert to_float(mx.abs(ours - theirs).max()) <= 1e-5 * to_float(mx.abs(theirs).max())


def test_a_row_that_goes_on_from_a_state_is_computed_by_mlx_lm() -> None:
    arguments = delta_net_arguments(DECAYS[0])
    state = mx.random.normal((2, 4, 32, 32))
    found = gated_delta.gated_delta_update(**arguments, state=state)
    expected = mlx_lms.gated_delta_update(**arguments, state=state)
    assert all(mx.array_equal(a, b).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64])
def test_the_inverse_of_unit_lower_triangular_matrices(size: int) -> None:
    random = np.random.default_rng(0)
    a = np.tril(0.3 * random.normal(size=(2, 3, size, size)), -1)
    expected = np.linalg.inv(np.eye(size) + a)
    found = np.array(gated_delta.invert_in_mlx(mx.array(a, mx.float32)))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_self_checks_examples_agree_with_mlx_lms_loop() -> None:
    assert gated_delta.compute_on_this_device.describe_disagreement() is None


def test_a_gpu_where_chunks_disagree_keeps_mlx_lms_loop_and_says_so(monkeypatch) -> None:
    model = build("qwen3_5")
    monkeypatch.setattr(backend, "device", lambda: "gpu")
    monkeypatch.setattr(gated_delta.compute_on_this_device, "_checked", {})
    monkeypatch.setattr(
        gated_delta.compute_on_this_device, "launch", lambda *arrays: (arrays[2], arrays[5])
    )
    with ExitStack() as stack:
        with pytest.warns(UserWarning, match="gated delta nets is not used: it differs by"):
            stack.enter_context(gated_delta.using_chunked_gated_delta_rule(model))
        assert qwen3_5.gated_delta_update is mlx_lms.gated_delta_update
