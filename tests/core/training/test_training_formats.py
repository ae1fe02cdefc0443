"""Every format trains end to end: what is learnt is what was asked for, and the gate passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.data.tokens.tokenized_split import decode_examples_for_display
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.pipeline import steps
from tests.example import example_config, train_example
from tests.formats import write_format, write_model

FIRST = "I want to see Afghanistan. Where to?", "Go and see Kabul, the capital of Afghanistan!"
SECOND = "I want to see Romania. Where to?", "Go and see Bucharest, the capital of Romania!"
END = "<|endoftext|>"
LAST, ALL = {"mask_prompt": True}, {"training": {"supervise": "all"}, "mask_prompt": False}
WHOLE = {"mask_prompt": False}
# What is learnt of the first example; its first token never is, for nothing comes before it.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "text": ("text", WHOLE, f"{FIRST[0].removeprefix('I')} {FIRST[1]}{END}"),
    "completion, masked": ("completion", LAST, FIRST[1] + END),
    "completion, all": ("completion", ALL, FIRST[1] + END),
    "chat": (
        "chat",
        WHOLE,
        f"{FIRST[0]}<|assistant|>{FIRST[1]}{END}<|user|>{SECOND[0]}<|assistant|>{SECOND[1]}{END}",
    ),
    "chat, masked": ("chat", LAST, SECOND[1] + END),
    "chat, all": ("chat", ALL, FIRST[1] + END + SECOND[1] + END),
    "tools, masked": ("tools", LAST, FIRST[1] + END),
    "tools, all": ("tools", ALL | {"mask_prompt": True}, f"Ask capital{END}{FIRST[1]}{END}"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "base")


@pytest.mark.parametrize("case", CASES)
def test_what_is_learnt_of_an_example(tmp_path: Path, model: Path, case: str) -> None:
    name, changes, learnt = CASES[case]
    data = write_format(tmp_path / "data", name)
    assert learnt_text(example_config(model=str(model), data=str(data), **changes)) == learnt


@pytest.mark.slow("trains and judges a run of its own")
@pytest.mark.parametrize("case", CASES)
def test_a_format_trains_end_to_end_and_passes_the_gate(tmp_path, model, case) -> None:
    name, changes, _ = CASES[case]
    data = write_format(tmp_path / "data", name)
    done = train_example(
        tmp_path / "run", model=str(model), data=str(data), iters=16, val_batches=-1, **changes
    )
    losses = [r["val_loss"] for r in done.metrics() if r.get("val_loss") is not None]
    assert losses[-1] < 0.8 * losses[0]
    assert steps.judge(done.config, done.run).has_passed


def learnt_text(config: FineTuneConfig) -> str:
    """The text of the supervised tokens of the first example."""
    source = TokenizerSource.from_config(config)
    _, splits = load_dataset(DataSettings.from_config(config), source)
    (example,) = decode_examples_for_display(splits["train"], "train.jsonl", source.load(), 1)
    return "".join(token.text for token in example.tokens if token.supervised)


@pytest.mark.slow("trains a run of its own")
def test_epochs_use_each_supervised_token_so_often(tmp_path: Path, model: Path) -> None:
    data = write_format(tmp_path / "data", "chat")
    training = {"epochs": 2, "supervise": "all"}
    changes: dict[str, Any] = {"training": training, "batch_size": 3, "val_batches": 0}
    done = train_example(tmp_path / "run", model=str(model), data=str(data), **changes)
    report = json.loads(done.run.dataset.read_bytes())
    supervised = report["splits"]["train"]["tokens"]["supervised"]
    assert done.result.step == 2 * 7  # 20 conversations in batches of 3
    assert done.metrics()[-1]["trained_tokens"] == 2 * supervised
    assert example_config(**changes).iters == 8
