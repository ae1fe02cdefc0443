"""The loss of a run on preferences, and the same loss of any adapters on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.errors import DatasetError
from nested_core.measure.losses.prediction_comparison import (
    ExamplePredictions,
    PredictionComparison,
    Vector,
)
from nested_core.models.lora_attachment import load_adapter_tensors
from nested_core.models.parameters import ParameterRefs, read_parameters, restoring_parameters
from nested_core.optim.gradients import Flat
from nested_core.rooms.preferences.loss_settings import (
    LossSettings,
    as_arguments,
    find_reference,
    read_settings,
)
from nested_core.rooms.preferences.losses import (
    Array,
    dpo_losses,
    kto_divergence,
    kto_losses,
    orpo_losses,
    simpo_losses,
)
from nested_core.rooms.preferences.reference_likelihoods import (
    ReferenceLikelihoods,
    digest_tokens,
    prepare_reference,
)
from nested_core.rooms.preferences.side_by_side import (
    Answers,
    Conversation,
    lay_out,
    read_labelled,
    read_pair,
    read_rows,
)
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
from nested_core.training.training_setup import LossInputs

if TYPE_CHECKING:
    from nested_core.measure.losses.held_out_loss import LoadedBase


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss on preferences by its name in `training.loss`, with its arguments.

    It is computed on twice as many rows as a batch has examples: chosen answers and then rejected
    ones; of kto each answer, and then another prompt's answer behind the same prompt.
    """

    name: str
    settings: LossSettings

    @property
    def has_labels(self) -> bool:
        """Whether each example is one answer with a label, not two answers."""
        return self.name == "kto"

    @property
    def read_example(self) -> Callable[..., Answers | None]:
        """The function that reads the answers in an example's tokens."""
        return read_labelled if self.has_labels else read_pair

    def read_rows(self, batch: MicroBatch) -> list[Answers | None]:
        """The answers in each row of a batch; None for a row without an example."""
        return read_rows(batch, self.read_example)

    def of_examples(
        self,
        likelihoods: Array,
        reference: Array,
        tokens: Array,
        is_wanted: Array,
    ) -> Array:
        """The loss of each example, (examples,); 0 for a row without one. MLX's arrays or NumPy's.

        Args:
            likelihoods: log-likelihoods of the answers in both halves of the rows, (2 examples,).
            reference: the same by the reference; zeros for a loss without one.
            tokens: how many each answer has, 0 in a row without an example.
            is_wanted: what the label says, bool (examples,); true for pairs.
        """
        functions: Any = np if isinstance(likelihoods, np.ndarray) else mx
        is_example = functions.split(tokens, 2)[0] > 0
        # A row without an answer is given a likely one, so that no gradient is NaN.
        bounded = functions.where(tokens > 0, likelihoods, -1.0)
        first, second = functions.split(bounded, 2)
        reference_first, reference_second = functions.split(reference, 2)
        arguments = as_arguments(self.settings)
        if self.name == "kto":
            divergence = kto_divergence(second, reference_second, is_example)
            losses = kto_losses(first, reference_first, is_wanted, divergence, **arguments)
        elif self.name == "dpo":
            losses = dpo_losses(first, second, reference_first, reference_second, **arguments)
        else:
            counts = functions.split(functions.maximum(tokens, 1), 2)
            function = simpo_losses if self.name == "simpo" else orpo_losses
            losses = function(first, second, *counts, **arguments)
        return functions.where(is_example, losses, 0)


@dataclass(frozen=True, eq=False)
class AnswerLikelihoods:
    """Log-likelihoods of answers by a model, of few positions at a time where it has a head."""

    chunked: ChunkedCrossEntropy | None

    @classmethod
    def of_model(cls, model: nn.Module, parameters: ParameterRefs) -> AnswerLikelihoods:
        """Through the model's output head, if it can be told from its body."""
        head = find_output_head(model, parameters)
        return cls(None if head is None else ChunkedCrossEntropy(head, None))

    def compute(self, model: Any, tokens: mx.array, mask: mx.array, rows: mx.array) -> mx.array:
        """Of each row, the sum over its answer's tokens in nats, float32 (rows,); differentiable.

        Args:
            model: inputs (rows, width) to logits.
            tokens: int32 (rows, width + 1).
            mask: bool (rows, width), whether token 1, 2, ... is of the answer.
            rows: the positions of these tokens in the flattened mask, int32, padded with -1.
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


def make_loss(inputs: LossInputs) -> Loss:
    """The loss of a run, with the likelihoods of its reference, where it has one, once it begins.

    Raises DatasetError where the data that is trained on has no prompts.
    """
    loss = PreferenceLoss(str(inputs.config.training.loss), read_settings(inputs.config))
    examples = {name: _read_examples(loss, split) for name, split in inputs.splits.items()}
    _require_prompts(examples["train"])
    mismatched = _mismatch_all(examples.values()) if loss.has_labels else {}
    reference = _Reference()

    def begin() -> None:
        """Compute the reference's likelihoods, or read those that the run keeps."""
        if (name := find_reference(inputs.config)) is not None:
            answers = [one for split in examples.values() for one in split]
            conversations = [one for answer in answers for one in answer.conversations]
            asked = [*conversations, *mismatched.values()]
            reference.likelihoods = prepare_reference(inputs, name, asked)

    likelihoods = AnswerLikelihoods.of_model(inputs.model, inputs.parameters)

    def by_row(model: Any, *arrays: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The sum over examples, their number, and the loss of each; arrays of `prepare`."""
        tokens, mask, rows, reference, is_wanted = arrays
        values = likelihoods.compute(model, tokens, mask, rows)
        counts = mask.sum(axis=1)
        losses = loss.of_examples(values, reference, counts, is_wanted)
        return losses.sum(), (mx.split(counts, 2)[0] > 0).sum(), losses

    def compile_evaluation(assign: Callable[[Flat], None]) -> EvaluateBatch:
        """The compiled `by_row` of any values of the parameters, which `assign` puts in."""

        def evaluate(values: Flat, *arrays: mx.array) -> tuple[mx.array, ...]:
            assign(values)
            return by_row(inputs.model, *arrays)

        return mx.compile(evaluate)

    return Loss(
        lambda model, *arrays: by_row(model, *arrays)[:2],
        prepare_batch=partial(_prepare_batch, loss, mismatched, reference),
        count_tokens=lambda tokens, mask, *_: mask.sum(),
        by_row=by_row,
        compile_chunked_evaluation=None if likelihoods.chunked is None else compile_evaluation,
        begin=begin,
        rows_to_begin=sum(map(len, examples.values())) if find_reference(inputs.config) else 0,
    )


def _read_examples(loss: PreferenceLoss, split: TokenizedSplit) -> list[Answers]:
    """The answers in each example of a split."""
    rows = range(len(split))
    examples = [loss.read_example(split.example(row), split.example_mask(row)[1:]) for row in rows]
    split.release_pages()
    return [answers for answers in examples if answers is not None]


def _require_prompts(examples: Sequence[Answers]) -> None:
    """Raise DatasetError where every answer begins with the first token: prompts would count."""
    if examples and all(one.conversations[0].prompt <= 1 for one in examples):
        raise DatasetError(
            "No example that is trained on has a prompt before its answer: the loss would count "
            "prompts too. Look at what is supervised with `nested-tune validate -c FILE --show 3`."
        )


def _mismatch_all(splits: Iterator[list[Answers]] | Any) -> dict[str, Conversation]:
    """Behind each example's prompt the answer of the next one, by the digest of the example."""
    return {
        digest_tokens(own.tokens): mismatch(own, other)
        for examples in splits
        for own, other in zip(examples, [*examples[1:], *examples[:1]], strict=True)
    }


def mismatch(own: Answers, other: Answers) -> Conversation:
    """The prompt of one example with the answer of another one."""
    (asked,), (answered,) = own.conversations, other.conversations
    tokens = np.concatenate([asked.tokens[: asked.prompt], answered.tokens[answered.prompt :]])
    return Conversation(tokens, asked.prompt)


def _prepare_batch(
    loss: PreferenceLoss,
    mismatched: Mapping[str, Conversation],
    reference: _Reference,
    batch: MicroBatch,
    position_counts: Mapping[int, int] | None = None,  # noqa: ARG001  # rows have widths of their own
) -> PreparedBatch:
    """What the loss of a run takes: tokens, mask, positions, the reference's values, and labels."""
    examples = loss.read_rows(batch)
    if loss.has_labels:
        others = [
            None if one is None else mismatched[digest_tokens(one.tokens)] for one in examples
        ]
    else:
        others = [None if one is None else one.conversations[1] for one in examples]
    conversations = [None if one is None else one.conversations[0] for one in examples] + others
    likelihoods = np.zeros(len(conversations))
    if reference.likelihoods is not None:
        likelihoods = reference.likelihoods.of(conversations)
    tokens, mask = widen_for_device(lay_out(conversations))
    _, rows = find_supervised_positions((tokens, mask))
    is_wanted = np.array([one is None or one.is_wanted for one in examples])
    return (
        mx.array(tokens),
        mx.array(mask),
        rows,
        mx.array(likelihoods.astype(np.float32)),
        mx.array(is_wanted),
    )


@dataclass(frozen=True, eq=False)
class AnswerFigures:
    """What several adapters make of the answers in a batch's examples; float64.

    likelihoods: log-likelihoods in nats, (adapters, 2, examples): of chosen and rejected answers,
        of kto of the answer and of another prompt's behind the same prompt.
    divergences: KL(adapter || last adapter) in nats/token of the answers, (adapters - 1, examples).
    tokens: of each answer, (2, examples); 0 in a row without an example.
    is_wanted: what the label says, bool (examples,); true for pairs.
    """

    likelihoods: Vector
    divergences: Vector
    tokens: Vector
    is_wanted: np.ndarray[Any, np.dtype[np.bool_]]


def measure_answers(
    loss: PreferenceLoss,
    comparison: PredictionComparison,
    values: Sequence[Flat],
    batch: MicroBatch,
) -> AnswerFigures:
    """The figures of a batch with each of these values of the parameters."""
    examples = loss.read_rows(batch)
    present = [one for one in examples if one is not None]
    others: Iterator[Conversation]
    if loss.has_labels:
        rolled = [*present[1:], *present[:1]]
        others = (mismatch(own, other) for own, other in zip(present, rolled, strict=True))
    else:
        others = (one.conversations[1] for one in present)
    second = [None if one is None else next(others) for one in examples]
    first = [None if one is None else one.conversations[0] for one in examples]
    predictions = comparison.compare(values, lay_out([*first, *second]))
    tokens = predictions.tokens.reshape(2, -1)
    divergences = predictions.divergences.reshape(len(values) - 1, 2, -1)
    compared = slice(0, 1) if loss.has_labels else slice(0, 2)
    answer_tokens = np.maximum(tokens[compared].sum(axis=0), 1)
    return AnswerFigures(
        likelihoods=-predictions.losses.reshape(len(values), 2, -1),
        divergences=divergences[:, compared].sum(axis=1) / answer_tokens,
        tokens=tokens,
        is_wanted=np.array([one is None or one.is_wanted for one in examples]),
    )


class HeldOutComparison:
    """The run's loss of any adapters on batches of examples, with the base as the reference.

    One reference for all of them: an adapter and the one that it began from, or a champion of an
    earlier night, compare by the same losses.
    """

    def __init__(self, base: LoadedBase, parameters: ParameterRefs) -> None:
        self._loss = PreferenceLoss(str(base.config.training.loss), read_settings(base.config))
        self._comparison = PredictionComparison.of_model(base.model, parameters)
        with restoring_parameters(parameters):
            load_adapter_tensors(base.model, base.parameters)
            self._base = read_parameters(parameters)

    def compare(self, values: Sequence[Flat], batch: MicroBatch) -> ExamplePredictions:
        """The loss of each example with each of `values`; an example counts as one token."""
        figures = measure_answers(self._loss, self._comparison, [self._base, *values], batch)
        of_base, *likelihoods = figures.likelihoods.reshape(len(values) + 1, -1)
        known = (of_base, figures.tokens.reshape(-1), figures.is_wanted)
        return ExamplePredictions(
            losses=np.array([self._loss.of_examples(one, *known) for one in likelihoods]),
            divergences=figures.divergences[1:],
            tokens=(figures.tokens[0] > 0).astype(np.float64),
        )
