"""The base model of a run, with a fresh adapter attached that the gate fills from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from nested_core.config.schema import FineTuneConfig
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.kernels.apply import prepared
from nested_core.models.base import base_fingerprint, find_model
from nested_core.models.lora import adapter_dtype, attach_adapter, load_base, load_leaves
from nested_core.models.parameters import read_parameters, trainable_refs
from nested_core.storage.adapter import WEIGHTS_NAME, load_arrays
from nested_core.training.evaluation import Evaluator, fixed_batches
from nested_core.training.loss.chunked import rule_for
from nested_core.training.loss.supervised import SUPERVISED


@dataclass(frozen=True)
class HeldBase:
    """A base model, its fingerprint, and the leaves that an adapter of this configuration has."""

    config: FineTuneConfig
    model: nn.Module
    leaves: dict[str, mx.array]
    fingerprint: str

    @classmethod
    def load(cls, config: FineTuneConfig, *, as_stored: bool = False) -> HeldBase:
        """Load the base at the precision of the run, or as it is stored."""
        model, _ = load_base(config, as_stored=as_stored)
        leaves = attach_adapter(model, config)
        return cls(config, model, leaves, base_fingerprint(find_model(config.model)))

    def losses(
        self, folders: tuple[Path, ...], split: TokenizedSplit, max_batches: int = -1
    ) -> list[float]:
        """The mean loss a supervised token with each adapter, on the same batches."""
        refs = trainable_refs(self.model, dtype=adapter_dtype(self.config, self.model))
        evaluator = Evaluator(self.model, refs, rule_for(self.model, refs, SUPERVISED))
        sizes = self.config.batch_size, max_batches, self.config.max_seq_length
        found = []
        with prepared(self.model, as_mlx_lm=self.config.training.reference is not None):
            for folder in folders:
                load_leaves(self.model, load_arrays(folder / WEIGHTS_NAME))
                found.append(evaluator.loss(read_parameters(refs), fixed_batches(split, *sizes)))
        return found
