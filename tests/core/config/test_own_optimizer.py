"""An optimizer of one's own is given as a class in Python; no name in a file leads to one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.optimizers import SGD

from nested_core.config.loading import load_config
from nested_core.config.sections import optimizer_classes
from nested_core.errors import ConfigError
from tests.example import prepare, train, write_config

RATE = 2.0**-10


class SignOfGradient(SGD):
    """Each parameter moves by the learning rate, against the sign of its gradient."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> Any:
        return parameter - self.learning_rate.astype(parameter.dtype) * mx.sign(gradient)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield write_config(tmp_path / "lora.yaml", iters=2, val_batches=0, learning_rate=RATE)
    for name in optimizer_classes().keys() - dict.fromkeys(known_to_mlx()):
        del optimizer_classes()[name]


def known_to_mlx() -> set[str]:
    return {name for name, cls in optimizer_classes().items() if cls.__module__.startswith("mlx.")}


def test_a_class_of_ones_own_trains_and_is_known_by_its_name_from_then_on(path: Path) -> None:
    with pytest.raises(ConfigError, match="'signofgradient' is no optimizer"):
        load_config(path, {"optimizer": "SignOfGradient"})
    config = load_config(path, {"optimizer": SignOfGradient, "nested.frequencies": [1]})
    assert config.optimizer == "signofgradient"
    done = train(config, prepare(config, path.parent / "run"))
    trained = dict(done.trainer.model.trainable_parameters()["model"]["layers"][5]["self_attn"])
    moved = trained["q_proj"]["lora_b"] / RATE  # it began at 0, and took two steps
    values = set(moved.flatten().tolist())
    assert values <= {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert values & {-2.0, 2.0}
    assert load_config(path, {"optimizer": "signofgradient"}).optimizer == "signofgradient"


def test_a_class_that_is_no_optimizer_or_has_anothers_name_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="Path takes no learning_rate, as mlx's optimizers do"):
        load_config(path, {"optimizer": Path})
    other = type("Adam", (SignOfGradient,), {})
    with pytest.raises(ConfigError, match="there is another optimizer of the name adam"):
        load_config(path, {"optimizer": other})
