"""Losses on fixed held-out examples, computed from adapter files with a freshly loaded base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core import backend, seams
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE, DataPolicy
from nested_core.data.batches import BatchRows, choose_evaluation_batches, make_batch_arrays
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset, load_run_data
from nested_core.data.example_digests import Digests, digest_prompts
from nested_core.data.held_out_rows import as_test_set_alone, read_group_values
from nested_core.data.tokens.tokenized_split import Bool, Int32, TokenizedSplit
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError, DatasetError
from nested_core.kernels.optimized_model import using_optimized_layers
from nested_core.measure.losses.loss_figures import compare_losses
from nested_core.measure.losses.prediction_comparison import (
    ExamplePredictions,
    PredictionComparison,
)
from nested_core.models.chat_template import Tokenizer
from nested_core.models.lora_attachment import (
    adapter_compute_dtype,
    leaving_out_idle_layers,
    load_adapter_tensors,
)
from nested_core.models.parameters import (
    ParameterRefs,
    in_evaluation_mode,
    read_parameters,
    reference_trainable_parameters,
)
from nested_core.models.session import Session, load_base_with_adapter
from nested_core.optim.gradients import Flat
from nested_core.records.dataset import DatasetReport, read_dataset_record
from nested_core.records.losses import ExampleLosses, Vector
from nested_core.records.paired_difference import Indices
from nested_core.records.verdict import GeneralLoss
from nested_core.storage.adapter import WEIGHTS_NAME, Adapter
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays
from nested_core.storage.untrusted_files import regular_sha256
from nested_core.text.digest_format import shorten_digest
from nested_core.training.loss.loss_interface import MicroBatch

MAX_LISTED_PROBLEMS = 3
POSITIONS_OF_A_BATCH_ON_CUDA = 8192


class Comparison(Protocol):
    """A loaded model that predicts with several values of its trainable parameters."""

    def compare(self, values: Sequence[Flat], batch: MicroBatch) -> ExamplePredictions:
        """Return the losses of a batch's examples with each of `values`."""


class PairLoss(Protocol):
    """A loss on pairs of answers, computed from their log-likelihoods."""

    def split(self, tokens: Int32, mask: Bool) -> list[tuple[Int32, range]]:
        """Return both answers' tokens, and the places of an answer among them.

        tokens, mask: a whole example, and whether each of its tokens is a target.
        """

    def of_pairs(self, likelihoods: Any, reference: Any, tokens: Any) -> Any:
        """Return the loss of each pair, (pairs,).

        likelihoods, reference: log-likelihoods of the answers, and by the base, (2 pairs,).
        tokens: how many each answer has, (2 pairs,).
        """


@dataclass(frozen=True)
class HeldOutLoss:
    """How a room's `training.loss` is measured on held-out examples.

    compare: returns the comparison for a base and references to its trainable parameters.
    pairs: returns the loss that a configuration names.
    """

    compare: Callable[[LoadedBase, ParameterRefs], Comparison]
    pairs: Callable[[FineTuneConfig], PairLoss]


class BatchHelpers(Protocol):
    """Other processes that compute batches beside this one, as `training.processes` of them."""

    def compare(
        self,
        base: LoadedBase,
        adapters: Sequence[Mapping[str, mx.array]],
        batches: Sequence[BatchRows],
        arrays: Callable[[BatchRows], MicroBatch],
    ) -> Iterator[ExamplePredictions]:
        """Yield what `base.compare_batches` would, to the bit: each batch is computed as a whole.

        arrays: makes a batch of its rows.
        """


@dataclass(frozen=True)
class LoadedBase:
    """A base model with a fresh adapter attached, into which adapters are loaded from files.

    parameters: the fresh adapter's parameters, by name.
    folder, tokenizer: the base model's.
    helpers: share the batches of losses; None if this process computes them all.
    """

    config: FineTuneConfig
    model: nn.Module
    parameters: dict[str, mx.array]
    folder: Path
    tokenizer: Tokenizer
    helpers: BatchHelpers | None = None

    @classmethod
    def load(
        cls, config: FineTuneConfig, session: Session | None = None, *, as_stored: bool = False
    ) -> LoadedBase:
        """Load the base at the precision of the run, or as it is stored.

        With a session, this may be the base that the run trained on. A caller that changes the base
        must load one without a session.
        """
        if session is None:
            base = load_base_with_adapter(config, as_stored=as_stored)
        else:
            base = session.load_base(config)
        helpers = None if session is None else session.helpers
        return cls(config, base.model, base.parameters, base.folder, base.tokenizer, helpers)

    def is_unchanged_by(self, tensors: Mapping[str, mx.array]) -> bool:
        """Return whether an adapter has no effect: its tensors, but lora_a, are a fresh one's.

        Every lora_b is then zero, so that lora_a has no effect.
        """
        return all(
            mx.array_equal(array, self.parameters[name].astype(array.dtype)).item()
            for name, array in tensors.items()
            if not name.endswith("lora_a")
        )

    @contextmanager
    def computing_with(self, adapter: Adapter | None) -> Iterator[None]:
        """Have the model compute with an adapter during the block, without dropout.

        None is the base alone, computed without the layers of the fresh adapter.
        """
        load_adapter_tensors(self.model, self.parameters if adapter is None else adapter.to_mlx())
        idle = leaving_out_idle_layers(self.model) if adapter is None else nullcontext()
        with in_evaluation_mode(self.model), idle:
            yield

    def as_plain(self) -> LoadedBase:
        """Return this base, set to measure the cross-entropy whatever the run's loss is."""
        training = self.config.training.model_copy(update={"loss": None})
        return replace(self, config=self.config.model_copy(update={"training": training}))

    def compare_predictions(
        self,
        adapters: Sequence[Mapping[str, mx.array]],
        split: TokenizedSplit,
        max_batches: int = -1,
    ) -> ExamplePredictions:
        """Compute the losses of several adapters on a split, and how far their predictions differ.

        adapters: each one's tensors by name; a divergence (Kullback-Leibler) is between the
            predictions of an adapter and those of the last one.
        max_batches: -1 is all batches. Examples in none of the batches get 0 everywhere.
        """
        max_seq_length = self.config.max_seq_length
        batch_size = self.config.batch_size if max_batches >= 0 else self._rows_of_a_batch(split)
        batches = choose_evaluation_batches(
            split, batch_size, max_batches, max_seq_length=max_seq_length
        )
        # A short batch is filled up with rows to ignore
        arrays = partial(make_batch_arrays, split, batch_size=batch_size)
        if self.helpers is None:
            predictions = self.compare_batches(adapters, map(arrays, batches))
        else:
            predictions = self.helpers.compare(self, adapters, batches, arrays)
        rows = (batch.rows for batch in batches)
        return ExamplePredictions.of_batches(zip(rows, predictions, strict=True), len(split))

    def compare_batches(
        self, adapters: Sequence[Mapping[str, mx.array]], batches: Iterable[MicroBatch]
    ) -> Iterator[ExamplePredictions]:
        """Yield the predictions of each batch with these adapters, computed as it is taken."""
        refs = reference_trainable_parameters(
            self.model, dtype=adapter_compute_dtype(self.config, self.model)
        )
        values = []
        for adapter in adapters:
            load_adapter_tensors(self.model, adapter)
            values.append(read_parameters(refs))
        loss = self.config.training.loss
        if loss is None:
            comparison: Comparison = PredictionComparison.of_model(self.model, refs)
        else:
            comparison = seams.load_for_loss(loss, HeldOutLoss).compare(self, refs)
        with using_optimized_layers(self.model):
            for batch in batches:
                yield comparison.compare(values, batch)

    def _rows_of_a_batch(self, split: TokenizedSplit) -> int:
        """Return how many rows are computed at once: `batch_size`, on CUDA as many as are fast.

        A batch of few positions leaves a GPU idle between its kernels. Without a limit of memory
        there is room for more, since nothing is kept for gradients.
        """
        config = self.config
        if not backend.computes_on_cuda() or config.training.memory_limit_gb is not None:
            return config.batch_size
        positions = min(int(split.lengths.max(initial=1)), config.max_seq_length)
        return max(config.batch_size, POSITIONS_OF_A_BATCH_ON_CUDA // positions)

    def example_loss_sums(
        self, adapters: Sequence[Path], split: TokenizedSplit, max_batches: int = -1
    ) -> list[tuple[Vector, Vector]]:
        """Return for each adapter folder the summed loss and the supervised tokens of each example.

        Both are float64 (n,), in the order of the split, and 0 for examples that are in none of the
        `max_batches` batches; -1 is all batches.
        """
        tensors = [load_arrays(adapter / WEIGHTS_NAME) for adapter in adapters]
        predictions = self.compare_predictions(tensors, split, max_batches)
        return [(losses, predictions.tokens) for losses in predictions.losses]


@dataclass(frozen=True)
class HeldOutExamples:
    """The examples that the gate measures losses on.

    file: the data set's file that they are in.
    selected_on_same_data: whether all of them are in the validation set, which selected the
        checkpoint.
    has_validation_examples: whether any of them is in the validation set.
    groups: the value of `data_policy.group` in each row, None in a row without it; None if
        `data_policy.group` is not configured.
    """

    split: TokenizedSplit
    file: str
    selected_on_same_data: bool
    has_validation_examples: bool = False
    groups: Sequence[str | None] | None = None

    @cached_property
    def is_example_supervised(self) -> Bool:
        """Whether each example of the split has a token that counts in the loss, bool (n,)."""
        counts = [self.split.example_mask(row).any() for row in range(len(self.split))]
        return np.array(counts, np.bool_)

    @cached_property
    def are_all_answers_equal(self) -> bool:
        """Whether two or more examples are supervised and all have the same supervised tokens."""
        answers = {
            self.split.example(row)[1:][self.split.example_mask(row)[1:]].tobytes()
            for row in np.flatnonzero(self.is_example_supervised).tolist()
        }
        return len(answers) == 1 and int(self.is_example_supervised.sum()) > 1

    @cached_property
    def clusters(self) -> Indices | None:
        """The cluster of each supervised example, int64; None if no two examples share a cluster.

        Examples with the same prompt, or the same value of `data_policy.group`, share a cluster,
        because they are not independent.
        """
        rows = np.flatnonzero(self.is_example_supervised).tolist()
        if self.groups is not None:
            keys = [self.groups[row] or f"line {self.split.lines[row]}" for row in rows]
        else:
            keys = digest_prompts(self.split)[rows].tolist()
        _, clusters = np.unique(keys, return_inverse=True)
        return None if len(np.unique(clusters)) == len(rows) else clusters.astype(np.int64)

    def make_losses(self, tokens: Vector, loss: str | None, **sums: Vector | None) -> ExampleLosses:
        """Divide sums over tokens by the number of tokens, for the supervised examples.

        Args:
            tokens: the number of supervised tokens of each example of the split, float64 (n,).
            loss: the `training.loss` that was measured.
            sums: the sum over these tokens of an adapter's losses or divergences, float64 (n,), by
                the name of its column in ExampleLosses; None if it was not measured.

        Returns losses in the unit of that loss.
        """
        is_counted = self.is_example_supervised
        counted = tokens[is_counted]
        columns: dict[str, Any] = {
            name: None if split_sums is None else split_sums[is_counted] / counted
            for name, split_sums in sums.items()
        }
        lines = self.split.lines[is_counted].astype(np.int64)
        columns["unit"] = seams.unit_of_loss(loss)
        columns["contents"] = self.digests
        return ExampleLosses(self.file, lines, counted, clusters=self.clusters, **columns)

    @cached_property
    def digests(self) -> Digests:
        """The digests of the supervised examples' content, uint64."""
        return self.split.contents[self.is_example_supervised]


def choose_held_out_examples(
    splits: Mapping[str, TokenizedSplit], choice: str = "auto"
) -> HeldOutExamples | None:
    """Return the held-out examples among the splits; None if the chosen split does not exist.

    choice: a value of `gate.held_out` that names splits, such as "auto" or "valid".
    """
    name = next((name for name in SPLITS_BY_HELD_OUT_CHOICE[choice] if name in splits), None)
    return None if name is None else _make_held_out_examples(splits[name], f"{name}.jsonl", splits)


def _make_held_out_examples(
    split: TokenizedSplit, file: str, splits: Mapping[str, TokenizedSplit]
) -> HeldOutExamples:
    """Build the held-out examples, and find out which of them are in the validation set."""
    valid = splits.get("valid")
    is_in_valid = np.isin(split.contents, () if valid is None else valid.contents)
    return HeldOutExamples(
        split,
        file,
        selected_on_same_data=bool(is_in_valid.all()),
        has_validation_examples=bool(is_in_valid.any()),
    )


def read_held_out_examples(
    config: FineTuneConfig, splits: Mapping[str, TokenizedSplit]
) -> HeldOutExamples | None:
    """Return the examples chosen by `gate.held_out`; None if `auto` finds no held-out split.

    `gate.held_out` is the name of a split, "auto", or the path of a file. The result also says
    whether the same examples selected the training step, which flatters the adapter.

    Raises ConfigError if `gate.held_out` names a file that does not exist, DatasetError if the file
    has errors.
    """
    choice = config.gate.held_out
    settings = DataSettings.from_config(config)
    if choice in SPLITS_BY_HELD_OUT_CHOICE:
        held_out = choose_held_out_examples(splits, choice)
    else:
        held_out = _make_held_out_examples(read_held_out_file(config), choice, splits)
    if held_out is None:
        return None
    if settings.policy.group is not None:
        held_out = replace(held_out, groups=_groups_of(settings, choice, held_out))
    if config.offers_best_step:
        return held_out
    # The last checkpoint is offered: the loss of these examples did not select it.
    return replace(held_out, selected_on_same_data=False, has_validation_examples=False)


def _groups_of(settings: DataSettings, choice: str, held_out: HeldOutExamples) -> list[str | None]:
    """Return the value of `data_policy.group` in the row of each held-out example."""
    lines = held_out.split.lines.tolist()
    if choice in SPLITS_BY_HELD_OUT_CHOICE:
        return read_group_values(settings, Path(held_out.file).stem, lines)
    with as_test_set_alone(Path(choice), settings) as file_settings:
        return read_group_values(file_settings, "test", lines)


def read_held_out_file(config: FineTuneConfig) -> TokenizedSplit:
    """Read and tokenize the file named by `gate.held_out`, supervised like the run's own data.

    Raises ConfigError if there is no such file, DatasetError if it has errors.
    """
    settings = DataSettings.from_config(config)
    return _read_and_validate_file("gate.held_out", Path(config.gate.held_out), config, settings)


def measure_example_losses(
    base: LoadedBase, initial: Adapter, trained: Adapter, held_out: HeldOutExamples
) -> tuple[ExampleLosses, ExamplePredictions]:
    """Measure the loss of each held-out example with the initial and with the trained adapter.

    Returns the losses, and the predictions that they are from, of these two adapters last. Also
    measures how far the predictions moved from the initial adapter's. With `gate.drift` it
    measures the distance from the base's too, which takes a third pass unless training began from
    the base itself.
    """
    before, after = initial.to_mlx(), trained.to_mlx()
    adapters = [before, after]
    wants_base = base.config.gate.drift
    if wants_base and not base.is_unchanged_by(before):
        adapters = [base.parameters, before, after]
    predictions = base.compare_predictions(adapters, held_out.split)
    losses = held_out.make_losses(
        predictions.tokens,
        base.config.training.loss,
        before=predictions.losses[-2],
        after=predictions.losses[-1],
        drift=predictions.divergences[-1],
        base_drift=predictions.divergences[0] if wants_base else None,
    )
    return losses, predictions


def measure_general_loss(base: LoadedBase, run: RunDirectory) -> GeneralLoss | None:
    """Measure both adapters' mean loss on `gate.general_data`; None if it is not configured.

    That is a file of general text, which shows whether training spoiled what it was not about. All
    of its tokens count, by the plain cross-entropy, whatever the run was trained with.

    Raises ConfigError if there is no such file, DatasetError if it has errors.
    """
    increase = base.config.gate.max_general_loss_increase
    if base.config.gate.general_data is None or increase is None:
        return None
    path = Path(base.config.gate.general_data)
    settings = DataSettings.from_config(base.config)
    settings = replace(settings, mask_prompt=False, supervise="last", loss=None)
    split = _read_and_validate_file("gate.general_data", path, base.config, settings)
    plain = base.as_plain()
    (before, tokens), (after, _) = plain.example_loss_sums((run.initial, run.adapter), split)
    examples = HeldOutExamples(split, path.name, selected_on_same_data=False)
    losses = examples.make_losses(tokens, None, before=before, after=after)
    figures = compare_losses(losses, losses.before, base.config.gate, increase)
    figures.pop("corrected_interval", None)  # general text selects no step: nothing to correct
    means = [finite_or_none(float(sums.sum() / tokens.sum())) for sums in (before, after)]
    sha256 = regular_sha256(path, follow_links=True)
    return GeneralLoss(means[0], means[1], str(path), sha256, **figures)


def require_validated_data(run: RunDirectory, report: DatasetReport) -> None:
    """Raise DatasetError if the data or tokenizer differ from those recorded in dataset.json."""
    recorded = read_dataset_record(run.dataset)
    validated = recorded.digest
    if report.tokenizer != recorded.tokenizer:
        raise DatasetError(
            f"The tokenizer, the chat template or the configuration of the base model has changed "
            f"since the data was validated for {run.path}. Bring back what was there, or start a "
            f"new run."
        )
    if report.digest != validated:
        raise DatasetError(
            f"The data in {report.folder} has changed since it was validated for {run.path}: its "
            f"digest is {shorten_digest(report.digest)}, dataset.json says "
            f"{shorten_digest(validated)}. Start a new run."
        )


def read_nonempty_splits(config: FineTuneConfig, run: RunDirectory) -> dict[str, TokenizedSplit]:
    """Load the run's data, check that it is what was validated, and return its nonempty splits."""
    report, splits = load_run_data(config, run)
    require_validated_data(run, report)
    return {name: split for name, split in splits.items() if len(split)}


def _read_and_validate_file(
    key: str, path: Path, config: FineTuneConfig, settings: DataSettings
) -> TokenizedSplit:
    """Validate and tokenize a file as a test set of its own; `key` names it in messages.

    The run's rules for the data (`policy`) do not apply to it.

    Raises ConfigError if there is no such file, DatasetError if it has errors.
    """
    if not path.is_file():
        raise ConfigError(f"{key}: {path} is not a file; expected a .jsonl file.")
    with as_test_set_alone(path, replace(settings, policy=DataPolicy())) as file_settings:
        report, splits = load_dataset(file_settings, TokenizerSource.from_config(config))
    problems = [
        f"line {finding.line or 1}: {finding.message}"
        for finding in report.findings
        if finding.file == "test.jsonl" and finding.severity == "error"
    ]
    if problems or not len(splits.get("test", ())):
        listed = "\n".join(f"  {problem}" for problem in problems[:MAX_LISTED_PROBLEMS])
        raise DatasetError(f"{key}: {path} holds no sound text to evaluate on.\n{listed}")
    return splits["test"]
