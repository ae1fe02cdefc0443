"""What the reference gives each answer: computed once before training, kept by the rows' digests.

The reference is the adapter that the run begins from, or the base alone: values of the same
model's parameters, so that no second model is in memory. What is kept stands in the run directory,
with the digest of the adapter that it was computed with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import numpy as np

from nested_core.data.tokens.tokenized_split import Int32
from nested_core.errors import ConfigError, DamagedError
from nested_core.kernels.optimized_model import using_optimized_layers
from nested_core.measure.losses.prediction_comparison import (
    ExamplePredictions,
    PredictionComparison,
    Vector,
)
from nested_core.models.lora_attachment import load_adapter_tensors
from nested_core.models.parameters import read_parameters, restoring_parameters
from nested_core.optim.gradients import Flat
from nested_core.rooms.preferences.loss_settings import Reference
from nested_core.rooms.preferences.side_by_side import Conversation, lay_out
from nested_core.storage.adapter import read_adapter
from nested_core.storage.json_file import JsonFile
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.stages import stages
from nested_core.training.training_setup import LossInputs
from nested_core.training.world import World

FILE_NAME = "reference-likelihoods.json"
MAX_BYTES = 2**30


def find_likelihoods_file(run: RunDirectory) -> Path:
    """Return the file in which a run keeps the likelihoods of the reference."""
    return run.path / "rooms" / "preferences" / FILE_NAME


def digest_tokens(tokens: Int32) -> str:
    """Identify a conversation: SHA-256 of its tokens, 16 hexadecimal digits."""
    return sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class ReferenceLikelihoods:
    """Log-likelihoods of answers by the reference, in nats, by the digest of their conversation.

    reference: `initial` or `base`; digest: of the adapter that training begins from.
    """

    reference: Reference
    digest: str
    by_conversation: Mapping[str, float]

    def has(self, conversations: Iterable[Conversation]) -> bool:
        """Return whether the reference was asked about all of these."""
        return all(digest_tokens(one.tokens) in self.by_conversation for one in conversations)

    def of(self, conversations: Sequence[Conversation | None]) -> Vector:
        """Return the likelihoods of these conversations, float64 (n,); 0 for None.

        Raises DamagedError for one that the reference was not asked about.
        """
        try:
            values = [
                0.0 if one is None else self.by_conversation[digest_tokens(one.tokens)]
                for one in conversations
            ]
        except KeyError:
            raise DamagedError(
                "The reference's likelihoods lack an answer that is trained on: they were computed "
                "for other data. Remove rooms/preferences in the run directory and start again."
            ) from None
        return np.array(values, np.float64)


LIKELIHOODS_FILE = JsonFile(ReferenceLikelihoods, MAX_BYTES)


def prepare_reference(
    inputs: LossInputs, reference: Reference, conversations: Sequence[Conversation]
) -> ReferenceLikelihoods:
    """Return the reference's likelihoods of these conversations; compute them if the run has none.

    Computed ones are written into the run directory. Raises ConfigError if one is not finite.
    """
    path = find_likelihoods_file(inputs.run)
    digest = read_adapter(inputs.run.initial).digest()
    by_digest = {digest_tokens(one.tokens): one for one in conversations}
    kept = read_likelihoods(path)
    has_all = (
        kept is not None
        and (kept.reference, kept.digest) == (reference, digest)
        and kept.has(conversations)
    )
    if not inputs.world.any_rank(not has_all) and kept is not None:
        return kept
    values = _compute_likelihoods(inputs, reference, list(by_digest.values()))
    if not np.isfinite(values).all():
        raise ConfigError(
            f"The reference (training.loss_config.reference: {reference}) gives answers no finite "
            f"likelihood, so that nothing can be compared with it. Begin from another adapter, or "
            f"set training.precision: float32."
        )
    computed = ReferenceLikelihoods(reference, digest, dict(zip(by_digest, values, strict=True)))
    if inputs.world.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        LIKELIHOODS_FILE.write(path, computed)
    return computed


def read_likelihoods(path: Path) -> ReferenceLikelihoods | None:
    """Read the likelihoods that a run keeps; None without a file, DamagedError for another one."""
    return LIKELIHOODS_FILE.read(path) if path.is_file() else None


def _compute_likelihoods(
    inputs: LossInputs, reference: Reference, conversations: Sequence[Conversation]
) -> list[float]:
    """Return the reference's log-likelihood of each conversation's answer, in nats."""
    adapter = "base" if reference == "base" else "initial adapter"
    stages.info("reference: likelihoods of %d answers by the %s", len(conversations), adapter)
    refs, world = inputs.parameters, inputs.world
    with restoring_parameters(refs):
        load_adapter_tensors(inputs.model, read_adapter(inputs.run.initial).to_mlx())
        values = read_parameters(refs)
    if reference == "base":
        values = leave_adapter_out(values)
    comparison = PredictionComparison.of_model(inputs.model, refs)
    rows = 2 * inputs.config.batch_size
    losses = compare_answers(comparison, [values], conversations, rows, world).losses[0]
    return [-float(loss) for loss in losses]


def leave_adapter_out(values: Flat) -> Flat:
    """Return the values of a LoRA adapter without effect: each lora_b is zero."""
    return {name: mx.zeros_like(v) if name.endswith("lora_b") else v for name, v in values.items()}


def compare_answers(
    comparison: PredictionComparison,
    values: Sequence[Flat],
    conversations: Sequence[Conversation],
    rows: int,
    world: World | None = None,
) -> ExamplePredictions:
    """Return losses of answers, and divergences between the models that give them.

    Args:
        comparison: computes them for a batch.
        values: the parameters of each model.
        conversations: the answers with what comes before them.
        rows: the number of conversations in a batch; those of similar length are put together.
        world: the ranks, which share the batches, and all of which get all results.
    """
    order = np.argsort([-len(one.tokens) for one in conversations], kind="stable")
    sums = np.zeros((2 * len(values) - 1, len(conversations)), np.float32)
    world, starts = world or World(), range(0, len(order), rows)
    with using_optimized_layers(comparison.model):
        for start in starts[world.rank :: world.size]:
            batch = order[start : start + rows]
            padded = [*(conversations[row] for row in batch), *[None] * (rows - len(batch))]
            compared = comparison.compare(values, lay_out(padded))
            columns = np.concatenate([compared.losses, compared.divergences])
            sums[:, batch] = columns[:, : len(batch)]
    # sum_scalars_over_ranks takes arrays too
    summed = np.array(world.sum_scalars_over_ranks({"sums": mx.array(sums)})["sums"], np.float64)
    tokens = np.array([len(one.tokens) - one.prompt for one in conversations], np.float64)
    return ExamplePredictions(summed[: len(values)], summed[len(values) :], tokens)
