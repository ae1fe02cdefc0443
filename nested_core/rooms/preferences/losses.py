"""The losses on preferences, each with its paper and equation, from log-likelihoods of answers.

Notation: x a prompt, y_w the chosen answer, y_l the rejected one, |y| an answer's tokens, log pi(y)
its log-likelihood given x, the sum over its tokens, and log pi_ref(y) the reference's.

Arrays are MLX's, for training, or NumPy's, in float64 for the gate: both have all that is needed
under the same names.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

Array = Any  # mx.array or np.ndarray


def dpo_losses(
    chosen: Array,
    rejected: Array,
    reference_chosen: Array,
    reference_rejected: Array,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Array:
    """Compute -log sigma(beta h), h = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l).

    Direct preference optimization: Rafailov et al., arXiv 2305.18290, equation 7. With
    label_smoothing e it is -(1 - e) log sigma(beta h) - e log sigma(-beta h), the conservative DPO
    of Mitchell, "A note on DPO with noisy preferences" (2023), equation 3.

    Args:
        chosen, rejected: log-likelihoods of the answers, in nats, (pairs,).
        reference_chosen, reference_rejected: the same by the reference.
        beta: above 0; the larger, the less may be moved away from the reference.
        label_smoothing: the share of pairs that are expected to be the wrong way round, below 0.5.

    Returns the loss of each pair, (pairs,).
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return _smoothed_log_loss(beta * margin, label_smoothing)


def simpo_losses(
    chosen: Array,
    rejected: Array,
    chosen_tokens: Array,
    rejected_tokens: Array,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Array:
    """Compute -log sigma(beta log pi(y_w)/|y_w| - beta log pi(y_l)/|y_l| - gamma).

    Simple preference optimization: Meng et al., arXiv 2405.14734, equation 6. label_smoothing as in
    `dpo_losses`. Tokens are how many each answer has, (pairs,).
    """
    margin = beta * (chosen / chosen_tokens - rejected / rejected_tokens) - gamma
    return _smoothed_log_loss(margin, label_smoothing)


def orpo_losses(
    chosen: Array,
    rejected: Array,
    chosen_tokens: Array,
    rejected_tokens: Array,
    *,
    beta: float,
) -> Array:
    """Compute L_SFT + beta L_OR: the chosen answer's loss a token, and the odds ratio's log loss.

    Odds ratio preference optimization: Hong et al., arXiv 2403.07691, equations 4 to 7, where beta
    is lambda. L_OR = -log sigma(log odds(y_w) - log odds(y_l)) with odds(y) = P(y) / (1 - P(y)) and
    P(y) = exp(log pi(y) / |y|).
    """
    mean_chosen, mean_rejected = chosen / chosen_tokens, rejected / rejected_tokens
    ratio = _log_odds(mean_chosen) - _log_odds(mean_rejected)
    return -mean_chosen - beta * _log_sigmoid(ratio)


def _smoothed_log_loss(margin: Array, label_smoothing: float) -> Array:
    loss = -_log_sigmoid(margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * _log_sigmoid(-margin)
    return loss


def _log_odds(mean_log_likelihood: Array) -> Array:
    """log(P / (1 - P)) of P = exp(m); -m is at least a rounding of 1, for P = 1 has no odds."""
    functions = _functions(mean_log_likelihood)
    smallest = functions.finfo(mean_log_likelihood.dtype).eps
    bounded = functions.minimum(mean_log_likelihood, -smallest)
    return bounded - functions.log(-functions.expm1(bounded))


def _log_sigmoid(values: Array) -> Array:
    return -_functions(values).logaddexp(0, -values)


def _functions(array: Array) -> Any:
    """Return the module that computes with an array."""
    return np if isinstance(array, np.ndarray) else mx
