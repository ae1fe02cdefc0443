"""Flags of train, run and validate: every key of the configuration, over the file."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from mlx_lm import lora

from flows.commands.config_flags import add_config_flags, load_config_from_flags
from nested_core import ConfigError, FineTuneConfig


def configured(*words: str) -> FineTuneConfig:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    return load_config_from_flags(parser.parse_args(["--model", "m", "--data", "d", *words]))


def test_every_flag_of_mlx_lm_is_there_with_the_same_kind_of_value() -> None:
    ours = argparse.ArgumentParser()
    add_config_flags(ours)
    flags = {name: action for action in ours._actions for name in action.option_strings}
    for action in lora.build_parser()._actions:
        for name in action.option_strings:
            assert flags[name].nargs == action.nargs, name


def test_a_flag_of_a_section_is_yaml_and_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text("nested: {frequencies: [1, 4], fast: deep}\ntraining:\n")
    config = configured(
        *("-c", str(path), "--nested.frequencies", "[1, 2]", "--training.max-grad-norm", "0.5"),
        *("--gate.check-fused", "true", "--lora-parameters.keys", "[self_attn.q_proj]"),
    )
    assert (config.nested.frequencies, config.nested.fast) == ((1, 2), "deep")
    assert config.training.max_grad_norm == 0.5
    assert config.gate.check_fused is True
    assert config.lora_parameters.modules == ("self_attn.q_proj",)


@pytest.mark.parametrize("flag", ["--training.warmup-steps", "--training.warmup_steps"])
def test_a_flag_of_a_section_is_taken_as_yaml_spells_it_too(flag: str) -> None:
    assert configured(flag, "3").training.warmup_steps == 3


def test_switches_and_sizes_are_those_of_mlx_lm() -> None:
    config = configured(
        "--mask-prompt", "--clear-cache-threshold", "2GB", "--learning-rate", "1e-4"
    )
    assert (config.mask_prompt, config.grad_checkpoint) == (True, False)
    assert config.clear_cache_threshold == 2 * 10**9
    assert config.learning_rate == 1e-4


def test_help_has_a_default_as_a_file_has_it() -> None:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    told = {name: action.help for action in parser._actions for name in action.option_strings}
    assert str(told["--nested.frequencies"]).endswith("(default: [1])")
    assert str(told["--mask-prompt"]).endswith("(default: false)")
    assert str(told["--optimizer"]).endswith("(default: adam)")
    assert str(told["--learning-rate"]).endswith("(default: 1e-05)")


def test_a_value_that_is_no_yaml_and_a_section_that_is_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the value of --nested.frequencies is not usable YAML"):
        configured("--nested.frequencies", "[1, 2")
    path = tmp_path / "lora.yaml"
    path.write_text("nested: 3\n")
    with pytest.raises(ConfigError, match="nested: Input should be a valid dictionary"):
        configured("-c", str(path), "--nested.fast", "deep")
