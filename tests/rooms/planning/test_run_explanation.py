"""`init` and `explain`: a first configuration, and what one will do before it is run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import save_config, save_model

from nested_core import ConfigError, DatasetError, FineTuneConfig, load_config
from nested_core.config.loading import parse_config, parse_yaml
from nested_core.config.sections import LoraParameters
from nested_core.models.base_model import fingerprint_base_model, load_base_model
from nested_core.models.lora_attachment import attach_adapter, make_adapter_config
from nested_core.models.parameters import trainable_parameters
from nested_core.registry.policy import set_policy
from nested_core.rooms.planning.learning_rate_rule import warn_of_learning_rate
from nested_core.rooms.planning.run_explanation import RunExplanation, explain_run
from nested_core.rooms.planning.suggested_config import suggest_config, suggest_learning_rate
from nested_core.storage.adapter import write_adapter
from nested_core.storage.atomic import new_directory
from tests.architectures import HYBRIDS, SIZES
from tests.builders.data_sets import write_lines
from tests.example import DATA, MODEL, example_config, example_settings

pytestmark = pytest.mark.slow("forecasts with the model and the data")


@pytest.fixture(scope="module")
def config() -> FineTuneConfig:
    """Two tiers, accumulation, and a registry."""
    return parse_config(
        example_settings(
            iters=20,
            batch_size=4,
            grad_accumulation_steps=2,
            nested={"frequencies": [1, 4]},
            registry={"path": "somewhere", "name": "capitals", "promote": "better"},
        ),
        source="a test",
    )


@pytest.fixture(scope="module")
def explanation(config: FineTuneConfig, tmp_path_factory: pytest.TempPathFactory) -> RunExplanation:
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("empty"))
        found = explain_run(config)
        assert list(Path().iterdir()) == []  # nothing is kept, no registry is made
    return found


def test_the_numbers_are_those_of_the_model_the_data_and_the_schedule(config, explanation) -> None:
    model, _ = load_base_model(config)
    attach_adapter(model, config)
    tensors = trainable_parameters(model)
    assert sum(tier.tensors for tier in explanation.tiers) == len(tensors)
    assert sum(tier.parameters for tier in explanation.tiers) == sum(
        tensor.size for tensor in tensors.values()
    )
    assert [(tier.frequency, tier.updates) for tier in explanation.tiers] == [(1, 10), (4, 2)]
    assert (explanation.iterations, explanation.steps) == (20, 10)
    rows = len((DATA / "train.jsonl").read_text().splitlines())
    assert explanation.epochs == 20 / math.ceil(rows / 4)
    assert explanation.memory.fits


def test_each_subject_is_said_in_words(explanation: RunExplanation) -> None:
    said = explanation.describe()
    assert "every step (10 updates)" in said["tiers"]
    assert "every 4 steps (2 updates)" in said["tiers"]
    assert "2 to an optimizer step: 10 steps" in said["steps"]
    bound = "within 2.00% or 0.01 nats/token, whichever is more."
    assert f"may not rise significantly, unless the rise is certainly {bound}" in said["gate"]
    assert said["registry"] == (
        "registered as capitals in somewhere, and made champion if its loss is significantly "
        "lower than the champion's."
    )


def test_what_the_registrys_policy_tightens_is_said(tmp_path: Path) -> None:
    registry = {"path": str(tmp_path), "name": "capitals", "promote": "always"}
    changes = {"promote": "better", "max_val_loss_increase": 0.01}
    set_policy(tmp_path, "capitals", by="ann", changes=changes)
    said = explain_run(example_config(registry=registry), measures_speed=False).describe()
    assert "unless the rise is certainly within 1.00% or 0.01" in said["gate"]
    assert said["registry"].endswith(
        "But the policy of capitals: gate.max_val_loss_increase is 0.01, not 0.02. "
        "But the policy of capitals: promote: better counts beside this run's always."
    )


@pytest.mark.parametrize(
    ("warmup", "said"), [(0.05, "the first 5 % of the steps"), (1, "1 step"), (7, "7 steps")]
)
def test_a_warm_up_is_said_in_words(explanation: RunExplanation, warmup: float, said: str) -> None:
    config = example_config(training={"warmup_steps": warmup, "decay": "cosine"})
    words = replace(explanation, config=config).describe()["learning rate"]
    assert f", after a warm-up over {said}, then falling to a tenth along a cosine" in words


def test_a_rate_that_is_never_reached_and_rows_that_are_never_used_are_told(
    explanation: RunExplanation,
) -> None:
    def words(warmup: int, epochs: float) -> dict[str, str]:
        config = example_config(training={"warmup_steps": warmup})
        return replace(explanation, config=config, epochs=epochs).describe()

    steps = explanation.steps
    assert "never" not in words(steps, 1.0)["learning rate"]
    told = f"a warm-up over {steps + 1} steps (more than the run has: this rate is never reached)"
    assert told in words(steps + 1, 1.0)["learning rate"]
    schedule = {"name": "cosine_decay", "arguments": [1e-4, 8], "warmup": steps + 1}
    own = replace(explanation, config=example_config(lr_schedule=schedule))
    assert told in own.describe()["learning rate"]
    assert "over the training data." in words(steps, 1.0)["steps"]
    told = "over the training data, so that some rows are never trained on."
    assert told in words(steps, 0.99)["steps"]


def test_the_rate_of_a_night_that_goes_on_is_the_one_that_it_is_trained_with(explanation) -> None:
    config = explanation.config.model_copy(update={"learning_rate": 1e-3})
    explained = replace(explanation, config=config, rate_share=0.3)
    words = explained.describe()["learning rate"]
    assert words.startswith("0.0003 (0.3 of 0.001, for it goes on from the champion)")
    product = 3e-4 * config.lora_parameters.rank * config.lora_parameters.scale
    assert f"Rank x scale x rate is {product:.2g};" in words


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "the checkpoint with the lowest loss is selected"),
        (
            {
                "training": {"reference": "mlx_lm", "max_grad_norm": 0},
                "nested": {"frequencies": [1]},
            },
            "the last step, as mlx_lm.lora does, is selected",
        ),
        ({"val_batches": 0}, "none: val_batches is 0, so the last checkpoint is selected"),
    ],
    ids=str,
)
def test_the_step_that_is_offered_is_the_one_said(explanation, change, said) -> None:
    examples = 0 if "val_batches" in change else explanation.validation_examples
    changed = replace(explanation, config=example_config(**change), validation_examples=examples)
    assert said in changed.describe()["evaluation"]


def test_the_file_that_the_gate_measures_on_is_named(explanation: RunExplanation) -> None:
    gate = explanation.config.gate.model_copy(update={"held_out": "kept.jsonl", "max_kl": 0.1})
    config = explanation.config.model_copy(update={"gate": gate})
    train = {"train": explanation.splits["train"]}
    run = replace(explanation, config=config, splits=train)
    sentence = run._describe_gate()
    said = " ".join(sentence)
    assert "loss on held-out examples, kept.jsonl, may not rise" in said
    assert "KL divergence from the start may be 0.1 nats/token" in said


def test_every_bound_that_can_reject_is_named_with_its_number(explanation: RunExplanation) -> None:
    task = {"name": "facts", "file": "q.jsonl", "score": "contains", "min": 0.9, "min_gain": 0.1}
    changes = {
        "max_val_loss_increase": 0.031,
        "max_harmed_share": 0.022,
        "max_skipped_share": 0.013,
        "min_relative_change": 0.004,
        "general_data": "general.jsonl",
        "max_general_loss_increase": 0.05,
        "max_kl": 0.6,
        "check_fused": True,
        "samples": "fail",
        "tasks": [task | {"max_drop": 0.07}],
    }
    said = replace(explanation, config=example_config(gate=changes)).describe()["gate"]
    for words in (
        *("within 3.10%", "at most 2.20% of these examples", "At most 1.30% of a tensor's updates"),
        *("move by 0.004 of its norm", "general.jsonl", "within 5.00%", "may be 0.6 nats/token"),
        *("survive fusing", "at least 90% right", "at least 10% more right", "at most 7% fewer"),
        "answers are broken by training, it is rejected",
    ):
        assert words in said


def test_what_no_run_could_train_on_is_refused_as_a_run_refuses_it(tmp_path: Path) -> None:
    shutil.copytree(DATA, tmp_path / "data")
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    settings = example_settings(data=str(tmp_path / "data"))
    with pytest.raises(DatasetError):
        explain_run(parse_config(settings, source="a test"))


def write_rows(folder: Path, fields: tuple[str, str]) -> None:
    folder.mkdir()
    for split, count in (("train", 12), ("valid", 6)):
        rows = [
            {fields[0]: f"Where is town {split} {n}?", fields[1]: f"In land {n}."}
            for n in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)


@pytest.mark.slow("takes steps")
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (("prompt", "completion"), {}),
        (("question", "answer"), {"prompt_feature": "question", "completion_feature": "answer"}),
    ],
)
def test_a_suggestion_loads_and_fits_the_data(tmp_path, fields, named) -> None:
    write_rows(tmp_path / "data", fields)
    path = tmp_path / "lora.yaml"
    path.write_text(suggest_config(str(MODEL), str(tmp_path / "data")).text)
    config = load_config(path)
    values = config.model_dump()
    assert {key: values[key] for key in named} == named
    assert (config.model, config.data) == (str(MODEL), str(tmp_path / "data"))
    assert (config.batch_size, config.training.epochs, config.mask_prompt) == (4, 20, True)
    assert (config.nested.frequencies, config.training.max_grad_norm) == ((1,), 1.0)
    assert (config.num_layers, config.learning_rate) == (-1, 1e-4)
    assert config.lora_parameters == LoraParameters(rank=8, scale=20.0)
    assert (config.training.warmup_steps, config.training.decay) == (0.05, "cosine")
    (tiers,) = [line for line in path.read_text().splitlines() if line.startswith("# nested: ")]
    with_tiers = load_config_text(path.read_text().replace("nested: {frequencies: [1]}", tiers[2:]))
    assert (with_tiers.nested.frequencies, with_tiers.nested.fast) == ((1, 2, 4), "deep")
    assert config.max_seq_length == 64
    assert "memory: needs about" in path.read_text()
    iterations = explain_run(config, measures_speed=False).iterations
    assert (
        f"# 20 passes are {iterations} steps of training. The usual 3 passes would be 9, too few: "
        "200 or more are wanted, in 20 passes at most.\n"
        "# The best step by the loss on valid is offered.\n"
    ) in path.read_text()
    assert warn_of_learning_rate(config) == []


@pytest.mark.slow("answers for its forecast")
@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (
            {"valid": 4, "test": 5},
            "valid.jsonl (4 examples) chooses the step, test.jsonl (5 examples) judges the adapter",
        ),
        ({"valid": 4}, "valid.jsonl (4 examples) chooses the step and judges the adapter"),
        ({"test": 5}, "test.jsonl (5 examples) judges the adapter"),
    ],
)
def test_a_suggestion_says_which_file_chooses_and_which_judges(tmp_path, counts, said) -> None:
    for split, count in ({"train": 20} | counts).items():
        rows = [{"prompt": f"Is it {split} {n}?", "completion": "y"} for n in range(count)]
        write_lines(tmp_path / "data" / f"{split}.jsonl", rows)
    assert f"\n# {said}.\n" in suggest_config(str(MODEL), str(tmp_path / "data")).text


@pytest.mark.slow("answers for its forecast")
@pytest.mark.parametrize(("answer", "sample_tokens"), [("y", 24), ("yes " * 30, 64)])
def test_sample_answers_to_labels_are_cut_early(tmp_path, answer, sample_tokens) -> None:
    for split, count in (("train", 20), ("valid", 4)):
        rows = [{"prompt": f"Is it {split} {n}?", "completion": answer} for n in range(count)]
        write_lines(tmp_path / "data" / f"{split}.jsonl", rows)
    text = suggest_config(str(MODEL), str(tmp_path / "data")).text
    assert load_config_text(text).training.sample_tokens == sample_tokens
    assert text.count("sample_tokens") == (sample_tokens == 24)


@pytest.mark.slow("writes and explains a configuration")
def test_a_suggestion_that_goes_on_from_an_adapter_has_its_shape_and_the_first_rate(
    tmp_path,
) -> None:
    write_rows(tmp_path / "data", ("prompt", "completion"))
    lora = {"rank": 4, "scale": 10.0, "keys": ["self_attn.q_proj"]}
    config = example_config(num_layers=2, lora_parameters=lora)
    model, _ = load_base_model(config)
    described = make_adapter_config(config, fingerprint_base_model(MODEL))
    with new_directory(tmp_path / "before") as folder:
        write_adapter(folder, attach_adapter(model, config), described)
    adapter = str(tmp_path / "before" / "adapters.safetensors")
    found = load_config_text(
        suggest_config(str(MODEL), str(tmp_path / "data"), adapter=adapter).text
    )
    assert (found.resume_adapter_file, found.num_layers) == (adapter, 2)
    assert found.lora_parameters == config.lora_parameters
    assert found.learning_rate == 4e-4  # 0.016 by rank 4 x scale 10


@pytest.mark.slow("writes long data sets")
def test_the_intervals_of_a_suggestion_scale_with_the_length(tmp_path: Path) -> None:
    write_rows(tmp_path / "data", ("prompt", "completion"))
    path = tmp_path / "lora.yaml"
    path.write_text(suggest_config(str(MODEL), str(tmp_path / "data")).text)
    longer = explain_run(load_config(path, {"training.epochs": 60}), measures_speed=False)
    assert longer.iterations == 180
    assert "A checkpoint every 18 batches." in longer.describe()["steps"]
    assert longer.describe()["evaluation"].startswith("every 18 batches on 6 examples")


def test_one_batch_one_layer_and_one_pass_are_said_as_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    config = example_config(
        data=str(tmp_path), iters=1, batch_size=1, num_layers=1, nested={"frequencies": [1]}
    )
    words = explain_run(config, measures_speed=False).describe()
    assert "in the last 1 layer of" in words["trained"]
    assert words["data"].startswith("train.jsonl 1 example, ")
    assert words["steps"].startswith("1 batch of 1 example; 1 pass over the training data.")
    assert "never" not in words["steps"]


@pytest.mark.slow("takes steps")
@pytest.mark.parametrize(
    ("context", "length", "overlong"), [(256, 128, "truncate"), (64, 64, "drop")]
)
def test_a_suggestion_has_room_for_a_long_held_out_example_or_leaves_it_out(
    tmp_path: Path, context: int, length: int, overlong: str
) -> None:
    shutil.copytree(MODEL, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    described = json.loads(path.read_text()) | {"max_position_embeddings": context}
    path.unlink()
    path.write_text(json.dumps(described))
    write_rows(tmp_path / "data", ("prompt", "completion"))
    with (tmp_path / "data" / "valid.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Where? " * 40, "completion": "There."}) + "\n")
    found = load_config_text(suggest_config(str(tmp_path / "base"), str(tmp_path / "data")).text)
    assert (found.max_seq_length, found.data_policy.overlong) == (length, overlong)


def test_a_suggestion_learns_every_answer_where_last_answers_are_marked(tmp_path: Path) -> None:
    first = [{"role": "user", "content": "Oslo?"}, {"role": "assistant", "content": "In Norway."}]
    last = [
        {"role": "user", "content": "Bye."},
        {"role": "assistant", "content": "No.", "weight": 0},
    ]
    (tmp_path / "data").mkdir()
    row = json.dumps({"messages": [*first, *last]}) + "\n"
    (tmp_path / "data" / "train.jsonl").write_text(row * 4)
    text = suggest_config(str(MODEL), str(tmp_path / "data")).text
    assert load_config_text(text).training.supervise == "all"


@pytest.mark.slow("takes a step for each batch size")
def test_a_batch_that_does_not_fit_is_made_smaller(tmp_path, monkeypatch) -> None:
    write_rows(tmp_path / "data", ("prompt", "completion"))
    text = suggest_config(str(MODEL), str(tmp_path / "data")).text
    needed = explain_run(parse_config(parse_yaml(text), source=""), measures_speed=False).memory
    monkeypatch.setattr("nested_core.backend.device_memory_bytes", lambda: (needed.needed or 0) - 1)
    smaller = load_config_text(suggest_config(str(MODEL), str(tmp_path / "data")).text)
    assert smaller.batch_size < 4 or smaller.grad_checkpoint


def test_adapters_of_linear_attention_are_said_to_fail_in_some_apps(explanation, tmp_path) -> None:
    sizes = SIZES | HYBRIDS["qwen3_5"] | {"model_type": "qwen3_5", "vocab_size": 1588}
    module = import_module("mlx_lm.models.qwen3_5")
    base = tmp_path / "base"
    shutil.copytree(MODEL, base)
    save_model(base, module.Model(module.ModelArgs.from_dict(sizes)))
    save_config(sizes, base / "config.json")
    config = example_config(model=str(base), num_layers=-1, nested={"frequencies": [1]})
    said = explain_run(config, measures_speed=False).describe()["trained"]
    assert "With linear_attn, apps of mlx-swift-lm may fail: docs/troubleshooting.md." in said
    assert "linear_attn" not in explanation.describe()["trained"]


def load_config_text(text: str) -> FineTuneConfig:
    return parse_config(parse_yaml(text), source="a test")


@pytest.mark.parametrize(
    ("model", "alpha", "rate"),
    [
        ({"model_type": "llama", "hidden_size": 64}, 160, 1e-4),
        ({"model_type": "llama", "hidden_size": 3072}, 160, 7.2e-5),
        ({"model_type": "llama", "hidden_size": 8192}, 160, 6.3e-5),  # 0.01 at least
        ({"model_type": "qwen3", "hidden_size": 4096}, 160, 9.5e-5),
        ({"model_type": "gemma3", "text_config": {"hidden_size": 5376}}, 160, 9.3e-5),
        ({"model_type": "llama", "hidden_size": 768}, 16, 1e-3),
        ({"model_type": "mamba"}, 160, 1e-4),
    ],
)
def test_the_rate_follows_alpha_and_the_models_width(
    tmp_path: Path, model: dict[str, Any], alpha: float, rate: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert suggest_learning_rate(alpha, tmp_path) == rate


def test_explain_refuses_a_service_that_no_run_could_report_to() -> None:
    pytest.importorskip("nested_core.rooms.services", reason="the room services is not there")
    with pytest.raises(ConfigError, match="report_to: nowhere is not known. Choose from"):
        explain_run(example_config(report_to="nowhere"))
