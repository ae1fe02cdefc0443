"""Models in training or evaluation mode, or of both: whoever evaluates gives each its own back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.models.parameters import read_parameters, reference_trainable_parameters
from nested_core.training.evaluation import Evaluator
from nested_core.training.loss.cross_entropy import find_output_head
from nested_core.training.parameter_importance import measure_parameter_importance
from tests.architectures import batch, build


def evaluated(model: nn.Module) -> None:
    refs = reference_trainable_parameters(model)
    Evaluator(model, refs).evaluate(read_parameters(refs), [batch()])


def asked(model: nn.Module) -> None:
    refs = reference_trainable_parameters(model)
    Evaluator(model, refs, prompts=[[1, 2, 3]]).logits_on_fixed_prompts(read_parameters(refs))


def probed(model: nn.Module) -> None:
    starts, lines = np.arange(0, 45, 9), np.arange(1, 5, dtype=np.int32)
    tokens, learnt = np.arange(36, dtype=np.int32), np.arange(36) % 9 > 0
    config = FineTuneConfig.model_validate({"nested": {"probe_batches": 1}})
    measure_parameter_importance(
        config, model, TokenizedSplit(tokens, learnt, starts, lines, lines.astype(np.uint64))
    )


USES: dict[str, Callable[[nn.Module], Any]] = {
    "head": lambda model: find_output_head(model, reference_trainable_parameters(model)),
    "loss": evaluated,
    "logits": asked,
    "probe": probed,
}


def modes_of(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.fixture
def mixed() -> Any:
    """A model that trains, one of its layers in evaluation mode."""
    model = build("llama", dropout=0.3)
    model.train()
    model.layers[1].eval()
    return model


@pytest.mark.parametrize("use", USES)
def test_whoever_evaluates_a_model_gives_each_module_its_own_mode_back(use, mixed) -> None:
    before = modes_of(mixed)
    assert set(before.values()) == {False, True}
    USES[use](mixed)
    assert modes_of(mixed) == before


@pytest.mark.parametrize("use", USES)
def test_they_do_after_an_error_too(use: str, mixed: Any) -> None:
    class Failing(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            assert not self.training
            raise RuntimeError("on purpose")

    mixed.layers[1].mlp = Failing()
    before = modes_of(mixed)
    with pytest.raises(RuntimeError, match="on purpose"):
        USES[use](mixed)
    assert modes_of(mixed) == before
