"""The loss of a run on preferences, and the same loss of any adapters on held-out examples.

The formulas come first, each with its paper and equation, from log-likelihoods of answers. Their
arrays are MLX's, for training, or NumPy's, in float64 for the gate: both have all that is needed
under the same names.

Notation: x a prompt, y_w the chosen answer, y_l the rejected one, |y| an answer's tokens, log pi(y)
its log-likelihood given x, the sum over its tokens, and log pi_ref(y) the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core.data.tokens.tokenized_split import Bool, Int32, TokenizedSplit
from nested_core.errors import DatasetError
from nested_core.measure.losses.held_out_loss import HeldOutLoss, LoadedBase
from nested_core.measure.losses.prediction_comparison import (
    ExamplePredictions,
    PredictionComparison,
)
from nested_core.models.lora_attachment import load_adapter_tensors
from nested_core.models.parameters import ParameterRefs, read_parameters, restoring_parameters
from nested_core.optim.gradients import Flat
from nested_core.rooms.preferences.loss_settings import LossSettings, find_reference, read_settings
from nested_core.rooms.preferences.reference_likelihoods import (
    ReferenceLikelihoods,
    prepare_reference,
)
from nested_core.rooms.preferences.side_by_side import Pair, lay_out_pairs, read_pair, read_pairs
from nested_core.training.loss.cross_entropy import (
    ChunkedCrossEntropy,
    find_output_head,
    find_supervised_positions,
    widen_for_device,
)
from nested_core.training.loss.loss_interface import (
    EvaluateBatch,
    Loss,
    MicroBatch,
    PreparedBatch,
    extract_logits,
)
from nested_core.training.training_setup import LossInputs, TrainingLoss

if TYPE_CHECKING:
    from nested_core.config.schema import FineTuneConfig


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
    chosen: Array, rejected: Array, chosen_tokens: Array, rejected_tokens: Array, *, beta: float
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


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss on pairs by its name in `training.loss`, with its arguments.

    It is computed on twice as many rows as a batch has pairs: chosen answers, then rejected ones.
    """

    name: str
    settings: LossSettings

    @classmethod
    def of_config(cls, config: FineTuneConfig) -> PreferenceLoss:
        """Return the loss that a configuration without problems names."""
        return cls(str(config.training.loss), read_settings(config))

    def split(self, tokens: Int32, mask: Bool) -> list[tuple[Int32, range]]:
        """Return of both answers of a pair the tokens and the places of the answer's among them.

        tokens, mask: a whole example, and whether each of its tokens is a target.
        """
        pair = read_pair(tokens, mask[1:]) or ()
        return [(one.tokens, range(one.prompt, len(one.tokens))) for one in pair]

    def of_pairs(self, likelihoods: Array, reference: Array, tokens: Array) -> Array:
        """Return the loss of each pair, (pairs,); 0 for a row without a pair.

        All are arrays of MLX, or all of NumPy.

        Args:
            likelihoods: log-likelihoods of the chosen answers, then of the rejected ones,
                (2 pairs,).
            reference: the reference's log-likelihoods; zeros for a loss without a reference.
            tokens: the number of tokens of each answer, 0 in a row without a pair.
        """
        functions: Any = np if isinstance(likelihoods, np.ndarray) else mx
        is_pair = functions.split(tokens, 2)[0] > 0
        # A row without an answer is given a likely one, so that no gradient is NaN.
        chosen, rejected = functions.split(functions.where(tokens > 0, likelihoods, -1.0), 2)
        arguments = self.settings.model_dump(exclude={"reference"})
        if self.name == "dpo":
            losses = dpo_losses(chosen, rejected, *functions.split(reference, 2), **arguments)
        else:
            counts = functions.split(functions.maximum(tokens, 1), 2)
            function = simpo_losses if self.name == "simpo" else orpo_losses
            losses = function(chosen, rejected, *counts, **arguments)
        return functions.where(is_pair, losses, 0)


@dataclass(frozen=True, eq=False)
class AnswerLikelihoods:
    """Log-likelihoods of answers by a model, of few positions at a time where it has a head."""

    chunked: ChunkedCrossEntropy | None

    @classmethod
    def of_model(cls, model: nn.Module, parameters: ParameterRefs) -> AnswerLikelihoods:
        """Compute through the model's output head, if it can be told from its body."""
        head = find_output_head(model, parameters)
        return cls(None if head is None else ChunkedCrossEntropy(head, None))

    def compute(self, model: Any, tokens: mx.array, mask: mx.array, rows: mx.array) -> mx.array:
        """Return the log-likelihood of each row's answer, in nats, float32 (rows,); differentiable.

        Args:
            model: computes logits from inputs (rows, width).
            tokens: int32 (rows, width + 1).
            mask: bool (rows, width), whether token 1, 2, ... is of the answer.
            rows: the positions of the answers' tokens in the flattened mask, int32, padded with -1.
        """
        if self.chunked is None:
            logits = extract_logits(model(tokens[:, :-1])).astype(mx.float32)
            losses = nn.losses.cross_entropy(logits, tokens[:, 1:])
            return -mx.where(mask, losses, 0).sum(axis=1)
        count, width = mask.shape
        losses = self.chunked.position_losses(tokens, rows)
        return -mx.zeros((count,)).at[mx.maximum(rows, 0) // width].add(losses)


@dataclass
class _Reference:
    """The likelihoods of a run's reference; None before the run begins, and without a reference."""

    likelihoods: ReferenceLikelihoods | None = None

    def prepare_batch(
        self,
        batch: MicroBatch,
        position_counts: Mapping[int, int] | None = None,  # noqa: ARG002  # rows have own widths
    ) -> PreparedBatch:
        """Return the arguments of the loss: tokens, mask, positions, reference's likelihoods."""
        conversations, rows = lay_out_pairs(read_pairs(batch))
        values = np.zeros(len(conversations))
        if self.likelihoods is not None:
            values = self.likelihoods.of(conversations)
        tokens, mask = widen_for_device(rows)
        _, positions = find_supervised_positions((tokens, mask))
        arrays = (mx.array(tokens), mx.array(mask), positions)
        return (*arrays, mx.array(values.astype(np.float32)))


def make_loss(inputs: LossInputs) -> Loss:
    """Return the loss of a run on preferences.

    Its `begin` computes the likelihoods of the reference, if the loss has one. Raises DatasetError
    if the data of train has no prompts.
    """
    loss = PreferenceLoss.of_config(inputs.config)
    pairs = {name: read_pairs_of_split(split) for name, split in inputs.splits.items()}
    _require_prompts(pairs["train"])
    reference = _Reference()

    def begin() -> None:
        """Compute the reference's likelihoods, or read those that the run keeps."""
        if (name := find_reference(inputs.config)) is not None:
            conversations = [one for split in pairs.values() for pair in split for one in pair]
            reference.likelihoods = prepare_reference(inputs, name, conversations)

    likelihoods = AnswerLikelihoods.of_model(inputs.model, inputs.parameters)

    def by_row(model: Any, *arrays: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return the sum of the losses of a batch's pairs, the number of pairs, and each loss.

        arrays: what `prepare_batch` returned.
        """
        tokens, mask, rows, reference = arrays
        counts = mask.sum(axis=1)
        losses = loss.of_pairs(likelihoods.compute(model, tokens, mask, rows), reference, counts)
        return losses.sum(), (mx.split(counts, 2)[0] > 0).sum(), losses

    def compile_evaluation(assign: Callable[[Flat], None]) -> EvaluateBatch:
        """Return `by_row`, compiled, for parameters that are given with each batch.

        assign: writes parameters into the model.
        """

        def evaluate(values: Flat, *arrays: mx.array) -> tuple[mx.array, ...]:
            assign(values)
            return by_row(inputs.model, *arrays)

        return mx.compile(evaluate)

    return Loss(
        lambda model, *arrays: by_row(model, *arrays)[:2],
        prepare_batch=reference.prepare_batch,
        count_tokens=lambda tokens, mask, *_: mask.sum(),
        by_row=by_row,
        compile_chunked_evaluation=None if likelihoods.chunked is None else compile_evaluation,
        begin=begin,
        rows_to_begin=sum(map(len, pairs.values())) if find_reference(inputs.config) else 0,
    )


def read_pairs_of_split(split: TokenizedSplit, rows: Iterable[int] | None = None) -> list[Pair]:
    """Return the pairs in a split, or in these rows of it."""
    chosen = range(len(split)) if rows is None else rows
    pairs = [read_pair(split.example(row), split.example_mask(row)[1:]) for row in chosen]
    split.release_pages()
    return [pair for pair in pairs if pair is not None]


def _require_prompts(pairs: Sequence[Pair]) -> None:
    """Raise DatasetError where every answer begins with the first token: prompts would count."""
    if pairs and all(pair.chosen.prompt <= 1 for pair in pairs):
        raise DatasetError(
            "No example that is trained on has a prompt before its answer: the loss would count "
            "prompts too. Look at what is supervised with `nested-tune validate -c FILE --show 3`."
        )


class HeldOutComparison:
    """The run's loss of any adapters on batches of pairs, with the base as the reference.

    One reference for all of them: an adapter and the one that it began from, or a champion of an
    earlier night, compare by the same losses.
    """

    def __init__(self, base: LoadedBase, parameters: ParameterRefs) -> None:
        self._loaded = base
        self._loss = PreferenceLoss.of_config(base.config)
        self._has_reference = find_reference(base.config) is not None
        self._comparison = PredictionComparison.of_model(base.model, parameters)
        with restoring_parameters(parameters):
            load_adapter_tensors(base.model, base.parameters)
            self._base = read_parameters(parameters)
        self._values: Sequence[Flat] = ()
        self._without_effect: list[int] = []

    def compare(self, values: Sequence[Flat], batch: MicroBatch) -> ExamplePredictions:
        """Return the loss of each pair with each adapter of `values`; a pair counts as one token.

        If the loss compares with the base, its likelihoods are computed too, or taken from an
        adapter that has no effect.
        """
        _, rows = lay_out_pairs(read_pairs(batch))
        if self._values is not values:  # they are the same for all batches of a split
            self._values = values
            unchanged = [row for row, one in enumerate(values) if self._loaded.is_unchanged_by(one)]
            self._without_effect = unchanged
        base = [self._base] if self._has_reference and not self._without_effect else []
        compared = self._comparison.compare([*base, *values], rows)
        of_base = -compared.losses[self._without_effect[0] if self._without_effect else 0]
        losses = compared.losses[len(base) :]
        tokens = compared.tokens.reshape(2, -1)
        divergences = compared.divergences[len(base) :].reshape(len(values) - 1, *tokens.shape)
        return ExamplePredictions(
            losses=np.array(
                [self._loss.of_pairs(-one, of_base, compared.tokens) for one in losses]
            ),
            divergences=divergences.sum(axis=1) / np.maximum(tokens.sum(axis=0), 1),
            tokens=(tokens[0] > 0).astype(np.float64),
            answer_losses=losses.reshape(-1, *tokens.shape),
            answer_tokens=tokens,
        )


TRAINING = TrainingLoss(make_loss)
HELD_OUT = HeldOutLoss(HeldOutComparison, PreferenceLoss.of_config)
