"""The schema: mlx-lm's defaults, keys that are refused, and parts that have to agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_lm.lora import CONFIG_DEFAULTS

from nested_core import ConfigError, FineTuneConfig
from nested_core.config.loading import parse_config, parse_tasks
from nested_core.config.resume import refuse_differences_on_resume
from tests.left_out import needs_rooms

DIFFERS = {"adapter_path", "train", "config"}  # said in FineTuneConfig, and done by flags
SCHEDULE = {"name": "cosine_decay", "arguments": [1e-5, 100]}


def problems(**values: Any) -> list[str]:
    """The lines that a configuration with these values is refused with."""
    with pytest.raises(ConfigError) as error:
        parse_config(values, source="test.yaml")
    first, *lines = str(error.value).splitlines()
    assert first == "The configuration in test.yaml cannot be used:"
    assert error.value.exit_code == 2
    return [line.strip() for line in lines]


class TestDefaults:
    def test_every_key_of_mlx_lm_is_known(self) -> None:
        assert CONFIG_DEFAULTS.keys() - DIFFERS <= FineTuneConfig.model_fields.keys()

    @pytest.mark.parametrize(
        "key", sorted(CONFIG_DEFAULTS.keys() - DIFFERS - {"lora_parameters", "optimizer_config"})
    )
    def test_a_default_is_mlx_lm_own(self, key: str) -> None:
        assert getattr(FineTuneConfig(), key) == CONFIG_DEFAULTS[key]

    def test_lora_parameters_are_mlx_lm_own(self) -> None:
        ours = FineTuneConfig().lora_parameters.model_dump(exclude_none=True)
        assert ours == CONFIG_DEFAULTS["lora_parameters"]

    @pytest.mark.parametrize("optimizer", ["adam", "adamw"])
    def test_optimizers_get_the_arguments_that_mlx_lm_gives_them(self, optimizer: str) -> None:
        config = parse_config({"optimizer": optimizer}, source="")
        defaults: Any = CONFIG_DEFAULTS["optimizer_config"]
        assert config.optimizer_arguments == defaults[optimizer]

    def test_training_is_implied_and_the_adapter_stays_in_the_run(self) -> None:
        assert FineTuneConfig().train is True
        assert FineTuneConfig().adapter_path is None

    def test_one_tier_of_frequency_1_and_nothing_of_ours_is_on(self) -> None:
        config = FineTuneConfig()
        assert config.nested.frequencies == (1,)
        assert (config.training.max_grad_norm, config.training.warmup_steps) == (0.0, 0)
        assert (config.registry.path, config.registry.promote) == (None, "never")


class TestLosses:
    def test_a_loss_that_no_room_has_is_refused_with_its_name(self) -> None:
        (problem,) = problems(training={"loss": "dop"})
        assert "training.loss: 'dop' is none of" in problem

    def test_arguments_of_a_loss_need_one(self) -> None:
        (problem,) = problems(training={"loss_config": {"beta": 0.1}})
        assert problem == "training.loss_config: no training.loss is given that takes these"


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("section", "key", "meant"),
        [
            (None, "itres", "iters"),
            (None, "learning-rate", "learning_rate"),
            (None, "neste", "nested"),
            ("nested", "frequency", "frequencies"),
            ("training", "max_gradnorm", "max_grad_norm"),
            ("gate", "max_val_loss", "max_val_loss_increase"),
            ("registry", "promot", "promote"),
            ("lora_parameters", "rnk", "rank"),
        ],
    )
    def test_the_nearest_known_key_is_suggested(self, section, key, meant) -> None:
        values = {key: 1} if section is None else {section: {key: 1}}
        name = key if section is None else f"{section}.{key}"
        assert problems(**values) == [f"{name}: unknown key; did you mean {meant}?"]

    def test_nothing_is_suggested_where_nothing_is_near(self) -> None:
        assert problems(zzzzzz=1) == ["zzzzzz: unknown key"]

    @pytest.mark.parametrize(
        ("values", "name"),
        [
            ({"lr_schedule": SCHEDULE | {"warmpu": 3}}, "lr_schedule.warmpu"),
            (
                {"nested": {"assignments": [{"match": "a", "tier": 0, "teir": 1}]}},
                "nested.assignments.0.teir",
            ),
        ],
    )
    def test_deeper_keys_are_refused_by_their_whole_name(self, values, name) -> None:
        assert problems(**values)[0].startswith(f"{name}: unknown key")


class TestAllProblemsAtOnce:
    def test_every_section_has_its_line(self) -> None:
        found = problems(
            itres=3,
            batch_size=0,
            optimizer="adamm",
            lora_parameters={"dropout": 1.0},
            nested={"frequencies": [4, 2]},
            training={"max_grad_norm": -1},
            gate={"max_skipped_share": 2},
            registry={"path": "somewhere"},
        )
        assert [line.split(":")[0] for line in found] == [
            *("optimizer", "batch_size", "lora_parameters.dropout", "nested"),
            *("training.max_grad_norm", "gate.max_skipped_share", "registry", "itres"),
        ]

    def test_every_disagreement_of_a_section_has_its_line(self) -> None:
        nested = {"frequencies": [4, 2], "learning_rate_scale": [1.0], "strategy": "manual"}
        assert problems(nested=nested, registry={"path": "there", "promote": "better"}) == [
            "nested: frequencies must ascend, fastest first; got (4, 2)",
            "nested: learning_rate_scale needs one number a tier (2), got 1",
            "nested: strategy manual needs assignments, and only manual takes them",
            "registry: registry needs both path and name, or neither",
        ]

    @needs_rooms("reference")
    def test_every_disagreement_between_sections_has_its_line(self) -> None:
        found = problems(
            optimizer="adagrad",
            optimizer_config={"adagrad": {"betas": [0.9, 0.99]}, "adamm": {}},
            lr_schedule=SCHEDULE | {"warmup": 3},
            nested={"frequencies": [1, 2], "weight_decay": [0.1, 0.1]},
            training={"warmup_steps": 3, "reference": "mlx_lm"},
        )
        assert [line.split(" ")[0] for line in found] == [
            "training.warmup_steps",
            "optimizer_config:",
            "optimizer_config.adagrad",
            "nested.weight_decay",
            "training.reference:",
        ]

    def test_a_line_says_what_was_expected_and_what_was_found(self) -> None:
        assert problems(batch_size=0) == ["batch_size: Input should be greater than 0; found 0"]

    def test_of_many_problems_ten_are_written_out(self) -> None:
        found = problems(**{f"zzzzz{i}": i for i in range(13)})
        assert (len(found), found[-1]) == (11, "and 3 more")


class TestPartsThatHaveToAgree:
    @pytest.mark.parametrize(
        ("nested", "named"),
        [
            ({"frequencies": [1], "weight_decay": [0.1, 0.2]}, "weight_decay needs"),
            ({"assignments": [{"match": "a", "tier": 0}]}, "strategy manual"),
            (
                {"strategy": "manual", "assignments": [{"match": "a", "tier": 1}]},
                "the assignment 'a' names tier 1",
            ),
        ],
    )
    def test_tiers(self, nested: dict[str, Any], named: str) -> None:
        (line,) = problems(nested=nested)
        assert line.startswith(f"nested: {named}")

    @pytest.mark.parametrize("key", ["batch_size", "max_seq_length"])
    def test_counts_stay_below_2_to_the_31(self, key: str) -> None:
        assert getattr(parse_config({key: 2**31 - 1}, source=""), key) == 2**31 - 1
        assert problems(**{key: 2**31})[0].startswith(f"{key}: Input should be less than")

    def test_a_pattern_has_to_be_a_regular_expression(self) -> None:
        nested = {"strategy": "manual", "assignments": [{"match": "(", "tier": 0}]}
        assert problems(nested=nested) == [
            "nested.assignments.0: '(' is not a regular expression: missing ), unterminated "
            "subpattern at position 0"
        ]

    @pytest.mark.parametrize("pattern", ["(" * 6000, "a{99999999999}"])
    def test_a_pattern_that_cannot_be_compiled_is_none_either(self, pattern: str) -> None:
        nested = {"strategy": "manual", "assignments": [{"match": pattern, "tier": 0}]}
        (line,) = problems(nested=nested)
        assert line.startswith("nested.assignments.0: '")
        assert "is not a regular expression: " in line

    @pytest.mark.parametrize("frequencies", [[], [0], [1, -2], list(range(1, 10)), 2])
    def test_1_to_8_frequencies_of_1_or_more(self, frequencies: Any) -> None:
        assert problems(nested={"frequencies": frequencies})[0].startswith("nested.frequencies")

    def test_warm_up_is_given_once(self) -> None:
        twice = {"lr_schedule": SCHEDULE | {"warmup": 3}, "training": {"warmup_steps": 3}}
        assert problems(**twice) == [
            "training.warmup_steps and lr_schedule.warmup: give only one of them"
        ]
        parse_config({"lr_schedule": SCHEDULE, "training": {"warmup_steps": 3}}, source="")

    def test_the_learning_rate_falls_by_one_rule(self) -> None:
        assert problems(lr_schedule=SCHEDULE, training={"decay": "cosine"}) == [
            "training.decay and lr_schedule: give only one of them"
        ]

    @pytest.mark.parametrize(("given", "kept"), [(3, 3), (3.0, 3), (0.05, 0.05), (0, 0)])
    def test_a_warm_up_is_a_number_of_steps_or_a_share(self, given: float, kept: float) -> None:
        config = parse_config({"training": {"warmup_steps": given}}, source="")
        assert config.training.model_dump()["warmup_steps"] == kept
        assert problems(training={"warmup_steps": 3.5})[0].startswith("training.warmup_steps: a ")

    @pytest.mark.parametrize(
        ("registry", "message"),
        [
            ({"name": "capitals"}, "registry needs both path and name, or neither"),
            ({"promote": "better"}, "promote: better needs a registry path and name"),
        ],
    )
    def test_registry(self, registry: dict[str, Any], message: str) -> None:
        assert problems(registry=registry) == [f"registry: {message}"]

    @pytest.mark.parametrize("name", ["../up", "", ".hidden", "a" * 65, "a/b", "a\n", "ä"])
    def test_a_registry_name_is_no_path(self, name: str) -> None:
        assert problems(registry={"path": "there", "name": name})[0].startswith("registry.name: ")

    def test_optimizer_config_for_the_chosen_optimizer(self) -> None:
        decay = {"adam": {"weight_decay": 0.1}, "adamw": {"weight_decay": 0.1}}
        assert problems(optimizer="adam", optimizer_config=decay) == [
            "optimizer_config.adam does not take ['weight_decay']; it takes "
            "['betas', 'bias_correction', 'eps']"
        ]
        config = parse_config({"optimizer": "adamw", "optimizer_config": decay}, source="")
        assert config.optimizer_arguments == {"weight_decay": 0.1}

    def test_weight_decay_a_tier_needs_an_optimizer_that_has_one(self) -> None:
        nested = {"frequencies": [1, 2], "weight_decay": [0.1, 0.2]}
        assert problems(nested=nested) == [
            "nested.weight_decay needs optimizer: adamw or another with one, not adam"
        ]
        for optimizer in ("adamw", "muon", "sgd", "lion"):
            config = parse_config({"optimizer": optimizer, "nested": nested}, source="")
            assert config.nested.weight_decay == (0.1, 0.2)

    def test_a_scale_of_the_learning_rate_needs_an_optimizer_that_uses_one(self) -> None:
        values: dict[str, Any] = {
            "optimizer": "adafactor",
            "nested": {"frequencies": [1, 2], "learning_rate_scale": [1.0, 0.5]},
        }
        assert problems(**values) == [
            "nested.learning_rate_scale: adafactor computes its own step size; give "
            "optimizer_config.adafactor.relative_step: false"
        ]
        values["optimizer_config"] = {"adafactor": {"relative_step": False}}
        assert parse_config(values, source="").optimizer == "adafactor"

    def test_an_optimizer_in_capitals_is_the_one_that_mlx_lm_takes_it_for(self) -> None:
        decay = {"adamw": {"weight_decay": 0.1}}
        config = parse_config({"optimizer": "AdamW", "optimizer_config": decay}, source="")
        assert (config.optimizer, config.optimizer_arguments) == ("adamw", decay["adamw"])

    def test_the_length_is_told_by_what_decides_it(self) -> None:
        assert parse_config({"iters": 1500}, source="").length == "1,500 iterations"
        one = parse_config({"training": {"epochs": 1}}, source="")
        assert one.length_and_tiers == "1 epoch"
        tiers = parse_config({"iters": 8, "nested": {"frequencies": [1, 2, 4]}}, source="")
        assert tiers.length_and_tiers == "8 iterations, tiers every 1, 2, 4 steps"
        epochs = {"iters": 1500, "training": {"epochs": 2.5}}
        assert parse_config(epochs, source="").length == "2.5 epochs"

    def test_an_optimizer_is_any_of_mlx(self) -> None:
        assert parse_config({"optimizer": "lion"}, source="").optimizer == "lion"
        (line,) = problems(optimizer="lioness")
        assert line.startswith("optimizer: 'lioness' is no optimizer; there are ['adadelta', ")

    @needs_rooms("reference")
    def test_a_reference_run_has_the_optimizers_of_mlx_lm(self) -> None:
        assert problems(optimizer="lion", training={"reference": "mlx_lm"}) == [
            "training.reference: mlx_lm.lora knows nothing of optimizer lion"
        ]

    @pytest.mark.parametrize(
        ("values", "name"),
        [
            ({"iters": True}, "iters"),
            ({"learning_rate": True}, "learning_rate"),
            ({"seed": False}, "seed"),
            ({"lora_parameters": {"rank": True}}, "lora_parameters.rank"),
            ({"nested": {"frequencies": [True, 2]}}, "nested.frequencies"),
            ({"training": {"keep_checkpoints": True}}, "training.keep_checkpoints"),
            ({"lr_schedule": SCHEDULE | {"warmup": False}}, "lr_schedule.warmup"),
        ],
    )
    def test_true_and_false_are_no_numbers(self, values: dict[str, Any], name: str) -> None:
        (line,) = problems(**values)
        assert line.startswith(f"{name}: true and false mean nothing here; found ")

    def test_true_and_false_stay_what_they_are_where_they_are_meant(self) -> None:
        arguments = {"adamw": {"bias_correction": True}}
        values = {"mask_prompt": True, "optimizer": "adamw", "optimizer_config": arguments}
        config = parse_config(values, source="")
        assert config.mask_prompt is True
        assert config.optimizer_arguments == {"bias_correction": True}

    @pytest.mark.parametrize("rate", [0, -1e-5, float("nan"), float("inf"), "fast"])
    def test_a_learning_rate_is_a_finite_number_above_0(self, rate: Any) -> None:
        assert problems(learning_rate=rate)[0].startswith("learning_rate: ")


def test_a_configuration_cannot_be_changed_and_survives_a_round_trip() -> None:
    values = {"nested": {"frequencies": [1, 2]}, "lora_parameters": {"keys": ["self_attn.q_proj"]}}
    config = parse_config(values, source="")
    with pytest.raises(ValueError, match="frozen"):
        config.iters = 3
    assert parse_config(config.model_dump(mode="json"), source="") == config


class TestIntervals:
    @pytest.mark.parametrize(
        ("iterations", "counts"), [(600, (30, 60, 150)), (30, (1, 3, 7)), (4, (1, 1, 1))]
    )
    def test_a_share_scales_with_the_length(self, iterations, counts) -> None:
        values = {"steps_per_report": 0.05, "steps_per_eval": 0.1, "save_every": 0.25}
        found = parse_config(values, source="").intervals(iterations)
        assert (found.report, found.evaluation, found.save) == counts

    @pytest.mark.parametrize(("iterations", "interval"), [(600, 60), (60, 6), (30, 5), (4, 5)])
    def test_a_short_run_is_not_spent_on_evaluations(self, iterations, interval) -> None:
        config = parse_config({"steps_per_eval": 0.1, "save_every": 0.1}, source="")
        assert config.intervals(iterations, batches=5).evaluation == interval
        assert config.intervals(iterations, batches=5).save == max(1, iterations // 10)
        asked = parse_config({"steps_per_eval": 1}, source="")
        assert asked.intervals(iterations, batches=5).evaluation == 1

    def test_a_whole_number_counts_iterations_and_stays_one(self) -> None:
        config = parse_config({"steps_per_eval": 20, "save_every": 0.5}, source="")
        assert config.intervals(100).evaluation == 20
        dumped = config.model_dump(mode="json")
        assert (repr(dumped["steps_per_eval"]), repr(dumped["save_every"])) == ("20", "0.5")

    def test_checkpoints_may_be_minutes_apart(self) -> None:
        config = parse_config({"save_every": "2.5m"}, source="")
        intervals = config.intervals(100)
        assert (intervals.save, intervals.save_seconds) == (None, 150.0)
        assert parse_config(config.model_dump(mode="json"), source="") == config

    @pytest.mark.parametrize("value", ["never", 0, -1])
    def test_a_hang_timeout_is_auto_or_seconds(self, value: object) -> None:
        (problem,) = problems(training={"hang_timeout": value})
        assert "training.hang_timeout: auto, seconds above 0, or null for none" in problem

    @pytest.mark.parametrize("value", ["10", "m", "0m", "1h", "-1m", "10081m"])
    def test_no_other_text_is_an_interval(self, value: str) -> None:
        (problem,) = problems(save_every=value)
        assert (
            "save_every: iterations, a share of the run below 1, or minutes such as 10m" in problem
        )

    @pytest.mark.parametrize(
        ("value", "said"), [(2.5, "a whole number of iterations, or a share"), (0, "greater than")]
    )
    def test_anything_else_is_refused(self, value: float, said: str) -> None:
        (line,) = problems(save_every=value)
        assert line.startswith("save_every: ")
        assert said in line


def test_a_folder_by_another_spelling_is_the_same_on_resume(tmp_path, monkeypatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    began = FineTuneConfig(data="data")
    for same in ("./data", str(tmp_path / "data"), "other/../data"):
        refuse_differences_on_resume(began, FineTuneConfig(data=same), tmp_path)
    with pytest.raises(ConfigError, match="  data: .*data in the run, .*other now"):
        refuse_differences_on_resume(began, FineTuneConfig(data="other"), tmp_path)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("score", ("exact", "contains")),
        ("max_tokens", (64, 4)),
        ("stop", ((), (".",))),
        ("file", ("a.jsonl", "b.jsonl")),
    ],
)
def test_the_suite_that_selects_the_step_is_scored_alike_on_resume(tmp_path, key, values) -> None:
    def config(value: Any, select_by: str = "which", **bounds: float) -> FineTuneConfig:
        task = {"name": "which", "file": "a.jsonl", "score": "exact", key: value, **bounds}
        training = {"evaluate_tasks": ["which"], "select_by": select_by}
        return parse_config({"gate": {"tasks": [task]}, "training": training}, source="a test")

    first, other = values
    refuse_differences_on_resume(config(first), config(first, min=0.5, max_drop=0.1), tmp_path)
    refuse_differences_on_resume(config(first, "loss"), config(other, "loss"), tmp_path)
    with pytest.raises(ConfigError, match=rf"  gate.tasks.{key}: .* in the run, .* now"):
        refuse_differences_on_resume(config(first), config(other), tmp_path)


@pytest.mark.parametrize("follows", [True, False])
def test_a_run_that_follows_a_champion_keeps_its_name_on_resume(tmp_path: Path, follows) -> None:
    def config(**registry: str) -> FineTuneConfig:
        values = {"registry": {"path": "registry", **registry}}
        continual = {"continual": {"from": "champion"}} if follows else {}
        return parse_config(values | continual, source="a test")

    refuse_differences_on_resume(config(name="a"), config(name="a", path="moved"), tmp_path)
    if follows:
        with pytest.raises(ConfigError, match="  registry.name: a in the run, b now"):
            refuse_differences_on_resume(config(name="a"), config(name="b"), tmp_path)
    else:
        refuse_differences_on_resume(config(name="a"), config(name="b"), tmp_path)


def test_an_eval_set_without_a_score_is_asked_and_scored_as_the_same_file_in_gate_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {"name": "labels", "file": "sub/../labels.jsonl", "score": "exact", "min": 0.9}
    (task,) = parse_tasks([{**fields, "max_tokens": 5, "stop": ["."]}], ())
    (same,) = parse_tasks([tmp_path / "labels.jsonl"], [task])
    assert (same.score, same.max_tokens, same.stop) == ("exact", 5, (".",))
    assert (same.name, same.min) == ("labels", None)
    (other,) = parse_tasks([{"name": "more", "file": "other.jsonl"}], [task])
    assert (other.score, other.max_tokens) == ("contains", 64)
    (given,) = parse_tasks([{"file": "labels.jsonl", "score": "regex"}], [task])
    assert (given.score, given.max_tokens) == ("regex", 64)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["q.csv", "other.csv"], ["q", "other"]),
        (["q.csv", "q.jsonl", "other.csv"], ["q.csv", "q.jsonl", "other"]),
        (["da/q.csv", "db/q.csv", "q.jsonl"], ["da-q.csv", "db-q.csv", "q.jsonl"]),
        (["a/d/q.csv", "b/d/q.csv"], ["a-d-q.csv", "b-d-q.csv"]),
    ],
)
def test_files_of_questions_with_one_name_are_told_apart_by_ending_or_folder(
    files: list[str], names: list[str]
) -> None:
    assert [task.name for task in parse_tasks(files, ())] == names


def test_one_file_is_no_two_eval_sets() -> None:
    with pytest.raises(ConfigError, match="two have the name q"):
        parse_tasks(["q.csv", Path("q.csv").absolute()], ())
