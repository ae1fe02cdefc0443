"""Losses on fixed held-out examples, computed from the adapter files with a base loaded anew."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core.config.data import DataPolicy
from nested_core.config.schema import FineTuneConfig
from nested_core.data.batch_arrays import make_batch_arrays
from nested_core.data.batch_order import choose_evaluation_batches
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset, load_run_data
from nested_core.data.example_digests import Digests, digest_examples
from nested_core.data.rules.dataset_report import DatasetReport
from nested_core.data.tokens.tokenized_split import Bool, TokenizedSplit
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError, DatasetError
from nested_core.gate.example_losses import ExampleLosses
from nested_core.gate.verdict import GeneralLoss
from nested_core.kernels.optimized_model import using_optimized_layers
from nested_core.models.base_model import find_model_folder, load_base_model
from nested_core.models.lora_attachment import (
    attach_adapter,
    compute_dtype_of_adapter,
    load_adapter_tensors,
)
from nested_core.models.parameters import read_parameters, reference_trainable_parameters
from nested_core.storage.adapter import WEIGHTS_NAME
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.dataset_record import read_dataset_record
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays
from nested_core.storage.strict_files import regular_sha256
from nested_core.training.evaluation import Evaluator, Vector
from nested_core.training.loss.supervised_loss import SUPERVISED

LISTED_PROBLEMS = 3


@dataclass(frozen=True)
class LoadedBase:
    """A base model with a fresh adapter attached, into which adapters are loaded from files.

    `folder` and `tokenizer` are the base's; `parameters` are those of the fresh adapter, by name.
    """

    config: FineTuneConfig
    model: nn.Module
    parameters: dict[str, mx.array]
    folder: Path
    tokenizer: Any

    @classmethod
    def load(cls, config: FineTuneConfig, *, as_stored: bool = False) -> LoadedBase:
        """Load the base at the precision of the run, or as it is stored."""
        model, tokenizer = load_base_model(config, as_stored=as_stored)
        parameters = attach_adapter(model, config)
        return cls(config, model, parameters, find_model_folder(config.model), tokenizer)

    def losses(
        self, adapters: Sequence[Path], split: TokenizedSplit, max_batches: int = -1
    ) -> list[tuple[Vector, Vector]]:
        """Of each adapter folder, the summed loss and the supervised tokens of each example.

        Both float64 [n], in the order of the split; 0 for examples that are in none
        of the `max_batches` batches; -1 is all of them.
        """
        refs = reference_trainable_parameters(
            self.model, dtype=compute_dtype_of_adapter(self.config, self.model)
        )
        evaluator = Evaluator(self.model, refs, SUPERVISED.for_model(self.model, refs))
        batch_size, max_seq_length = self.config.batch_size, self.config.max_seq_length
        batches = choose_evaluation_batches(
            split, batch_size, max_batches, max_seq_length=max_seq_length
        )
        losses = []
        with using_optimized_layers(
            self.model, as_mlx_lm=self.config.training.reference is not None
        ):
            for adapter in adapters:
                load_adapter_tensors(self.model, load_arrays(adapter / WEIGHTS_NAME))
                sums, tokens = np.zeros(len(split)), np.zeros(len(split))
                values = read_parameters(refs)
                for batch in batches:
                    arrays = make_batch_arrays(split, batch, batch_size)
                    row_sums, row_tokens = evaluator.row_losses(values, arrays)
                    sums[batch.rows] = row_sums[: len(batch.rows)]
                    tokens[batch.rows] = row_tokens[: len(batch.rows)]
                losses.append((sums, tokens))
        return losses

    def mean_losses(
        self, adapters: Sequence[Path], split: TokenizedSplit, max_batches: int = -1
    ) -> list[float]:
        """The mean loss over supervised tokens with each adapter folder, on the same batches."""
        losses = self.losses(adapters, split, max_batches)
        return [float(sums.sum() / tokens.sum()) for sums, tokens in losses]


@dataclass(frozen=True)
class HeldOutExamples:
    """The examples that the gate measures losses on, and the data set's file that they are in.

    They are those of test.jsonl, or without one the validation set, by which the best checkpoint
    was chosen: `selected_on_same_data` says so, of a test set within it as well.
    """

    split: TokenizedSplit
    file: str
    selected_on_same_data: bool

    @cached_property
    def has_target(self) -> Bool:
        """Whether each example of the split has a token that the loss counts, bool [n]."""
        counts = [self.split.example_mask(row).any() for row in range(len(self.split))]
        return np.array(counts, np.bool_)

    @cached_property
    def digests(self) -> Digests:
        """The digests of the examples that have such a token, uint64."""
        return digest_examples(self.split)[self.has_target]


def choose_held_out_examples(splits: Mapping[str, TokenizedSplit]) -> HeldOutExamples | None:
    """The held-out examples among the splits of a run's data; None without any."""
    valid = splits.get("valid")
    name = "test" if "test" in splits else "valid"
    split = splits.get(name)
    if split is None:
        return None
    is_selected = valid is not None and split.is_subset_of(valid)
    return HeldOutExamples(split, f"{name}.jsonl", selected_on_same_data=is_selected)


def measure_example_losses(
    base: LoadedBase, run: RunDirectory, held_out: HeldOutExamples
) -> ExampleLosses:
    """The loss of each held-out example with the initial and with the trained adapter."""
    before, after = base.losses((run.initial, run.adapter), held_out.split)
    has_target = held_out.has_target
    tokens = before[1][has_target]
    return ExampleLosses(
        file=held_out.file,
        lines=held_out.split.lines[has_target].astype(np.int64),
        tokens=tokens,
        before=before[0][has_target] / tokens,
        after=after[0][has_target] / tokens,
    )


def measure_test(config: FineTuneConfig, run: RunDirectory) -> float:
    """Mean loss of the run's adapter on `test_batches` batches of test.jsonl, as `test` asks for.

    Raises DatasetError if there is no test set.
    """
    split = filled_splits(config, run).get("test")
    if split is None:
        raise DatasetError(f"test: {config.data} has no test.jsonl, or it is empty.")
    return LoadedBase.load(config).mean_losses((run.adapter,), split, config.test_batches)[0]


def measure_general(base: LoadedBase, run: RunDirectory) -> GeneralLoss | None:
    """Mean loss with either adapter on `gate.general_data`; None if that is not configured.

    Raises ConfigError if there is no such file, DatasetError if it has an error.
    """
    if base.config.gate.general_data is None:
        return None
    path = Path(base.config.gate.general_data).expanduser()
    split = _read_general(base.config, path)
    before, after = map(finite_or_none, base.mean_losses((run.initial, run.adapter), split))
    return GeneralLoss(before, after, str(path), regular_sha256(path, follow_links=True))


def require_validated_data(run: RunDirectory, report: DatasetReport) -> None:
    """Raise DatasetError if the data is not what dataset.json says was validated."""
    validated = read_dataset_record(run.dataset).digest
    if report.digest != validated:
        raise DatasetError(
            f"The data in {report.folder} has changed since it was validated for {run.path}: its "
            f"digest is {report.digest[:12]}, dataset.json says {validated[:12]}. Start a new run."
        )


def filled_splits(config: FineTuneConfig, run: RunDirectory) -> dict[str, TokenizedSplit]:
    """The splits that have examples, of the data that the run was validated with."""
    report, splits = load_run_data(config)
    require_validated_data(run, report)
    return {name: split for name, split in splits.items() if len(split)}


def _read_general(config: FineTuneConfig, path: Path) -> TokenizedSplit:
    """One file, validated and tokenized as a test set of its own; every token of it counts."""
    if not path.is_file():
        raise ConfigError(f"gate.general_data: {path} is not a file; expected a .jsonl file.")
    with tempfile.TemporaryDirectory(prefix="nested-tune-general-") as folder:
        Path(folder, "test.jsonl").symlink_to(path.resolve())
        settings = replace(
            DataSettings.from_config(config),
            data=folder,
            hf_dataset=(),
            mask_prompt=False,
            supervise="last",
            policy=DataPolicy(),
        )
        report, splits = load_dataset(settings, TokenizerSource.from_config(config))
    problems = [
        f"line {finding.line or 1}: {finding.message}"
        for finding in report.findings
        if finding.file == "test.jsonl" and finding.severity == "error"
    ]
    if problems or not len(splits.get("test", ())):
        listed = "\n".join(f"  {problem}" for problem in problems[:LISTED_PROBLEMS])
        raise DatasetError(f"gate.general_data: {path} holds no sound text to judge by.\n{listed}")
    return splits["test"]
