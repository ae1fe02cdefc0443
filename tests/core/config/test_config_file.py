"""Configuration files: which YAML is read, what is refused and where, and who wins over whom."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core import ConfigError, FineTuneConfig, load_config
from nested_core.config.loading import MAX_YAML_BYTES, parse_yaml, read_yaml, render_config
from tests.left_out import needs_rooms

Write = Callable[[str | bytes], Path]
yaml_like = st.text("{}[]:,-?|>'\"#%&*!@<= \n\tab1e.~").map(str.encode)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration file."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "lora.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refusal(path: Path) -> str:
    """The message that a file is refused with, without its path."""
    with pytest.raises(ConfigError) as error:
        load_config(path, {})
    assert str(path) in str(error.value)
    return str(error.value).replace(str(path), "FILE")


class TestPrecedence:
    def test_flag_over_yaml_over_default(self, write: Write) -> None:
        path = write("iters: 7\nbatch_size: 2\n")
        config = load_config(path, {"iters": 9})
        assert (config.iters, config.batch_size, config.save_every) == (9, 2, 100)

    def test_flags_alone_need_no_file(self) -> None:
        assert load_config(None, {"iters": 9}) == FineTuneConfig(iters=9)

    def test_a_flag_of_a_section_within_a_section(self, write: Write) -> None:
        within = "continual: {skip_unchanged: false, replay: {missing: error, fraction: 0.5}}"
        given = load_config(write(within), {"continual.replay.sources": "a.jsonl"}).continual
        assert (given.skip_unchanged, given.replay.fraction) == (False, 0.5)
        assert (given.replay.missing, given.replay.sources) == ("error", ("a.jsonl",))

    def test_null_in_the_file_means_the_default(self, write: Write) -> None:
        config = load_config(write("iters: null\nlr_schedule: ~\nnested:\ntraining: null\n"), {})
        assert config == FineTuneConfig()

    @pytest.mark.parametrize("content", ["", "# nothing yet\n", "---\n", "{}\n"])
    def test_an_empty_file_is_all_defaults(self, write: Write, content: str) -> None:
        assert load_config(write(content), {}) == FineTuneConfig()

    def test_a_bad_flag_is_told_by_its_own_name(self) -> None:
        with pytest.raises(ConfigError) as error:
            load_config(None, {"iters": 0})
        assert str(error.value) == (
            "The command line cannot be used:\n"
            "  iters: Input should be greater than 0; found 0 (--iters)"
        )


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("1e-5", 1e-5),
            ("1E-5", 1e-5),
            ("+2e-4", 2e-4),
            ("1.5e-3", 1.5e-3),
            (".5e-3", 5e-4),
            ("3e2", 300.0),
            ("0.001", 0.001),
            ("1", 1.0),
        ],
    )
    def test_an_exponent_needs_no_point(self, write: Write, text: str, number: float) -> None:
        assert read_yaml(write(f"learning_rate: {text}\n")) == {"learning_rate": number}

    def test_numbers_in_lists_are_numbers_too(self, write: Write) -> None:
        path = write("lr_schedule: {name: cosine_decay, arguments: [1e-5, 1000, 1e-6]}\n")
        schedule = load_config(path, {}).lr_schedule
        assert schedule is not None
        assert schedule.arguments == (1e-5, 1000.0, 1e-6)

    @pytest.mark.parametrize("text", ["e5", "1e", "1e-5x", "v1e5", "'1e-5'"])
    def test_what_only_looks_like_a_number_stays_text(self, write: Write, text: str) -> None:
        assert read_yaml(write(f"model: {text}\n")) == {"model": text.strip("'")}

    @given(st.floats(allow_nan=False, allow_infinity=False))
    def test_every_float_that_python_writes_is_read_back(self, tmp_path_factory, number) -> None:
        path = tmp_path_factory.getbasetemp() / "number.yaml"
        path.write_text(f"learning_rate: {number!r}\n")
        assert read_yaml(path) == {"learning_rate": number}


class TestRefusedYaml:
    @pytest.mark.parametrize(
        ("content", "place", "what"),
        [
            ("model: &base x\n", "line 1, column 8", "an anchor or alias (& or *)"),
            ("iters: 3\ndata: *base\n", "line 2, column 7", "an anchor or alias (& or *)"),
            ("nested: &n\n  fast: deep\n", "line 1, column 9", "an anchor or alias (& or *)"),
            ("model: !!python/name:os.system\n", "line 1, column 8", "a tag (!)"),
            ("model: !!str 3\n", "line 1, column 8", "a tag (!)"),
            ("data: !local x\n", "line 1, column 7", "a tag (!)"),
            (
                "iters: 3\niters: 4\n",
                "line 2, column 1",
                "the key 'iters', which is in line 1 too,",
            ),
            (
                "nested:\n  fast: deep\n  fast: deep\n",
                "line 3, column 3",
                "the key 'fast', which is in line 2 too,",
            ),
            (
                "gate: {a: 1, b: 2, 'a': 3}\n",
                "line 1, column 20",
                "the key 'a', which is in line 1 too,",
            ),
        ],
    )
    def test_by_reference_by_type_and_twice(self, write, content, place, what) -> None:
        expected = f"FILE is not usable YAML: {place}: {what} is not allowed here."
        assert refusal(write(content)) == expected

    def test_anchors_that_would_grow_without_bound(self, write: Write) -> None:
        bomb = "a: &a [x, x, x, x]\n" + "".join(f"a{i}: &b{i} [*a, *a, *a]\n" for i in range(9))
        assert "an anchor or alias" in refusal(write(bomb))

    def test_a_tag_never_runs_anything(self, write: Write, tmp_path: Path) -> None:
        mark = tmp_path / "ran"
        assert "a tag (!)" in refusal(write(f"model: !!python/object/apply:os.mkdir ['{mark}']\n"))
        assert not mark.exists()

    def test_more_than_64_kib(self, write: Write) -> None:
        assert MAX_YAML_BYTES == 65536
        load_config(write(b"#" * 65536), {})
        expected = "FILE is larger than 64 KiB. That is not a configuration."
        assert refusal(write(b"#" * 65537)) == expected

    @pytest.mark.parametrize(
        ("content", "kind"), [("- iters\n", "list"), ("iters\n", "str"), ("3\n", "int")]
    )
    def test_what_is_no_mapping(self, write: Write, content: str, kind: str) -> None:
        assert refusal(write(content)) == f"FILE should hold keys and values; found a {kind}."

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("iters: 3\n  data: x\n", r"line 2, column 7: mapping values are not allowed here"),
            ("iters: [1, 2\n", r"line 2, column 1: expected ',' or '\]', but got"),
            ("iters: 3\n---\niters: 4\n", r"line 2, column 1: but found another document"),
            ("? [a]\n: b\n", r"line 1, column 3: found unhashable key"),
            (b"model: \xe9\n", r"unacceptable character #x00e9"),
            (b"model: \x00\n", r"unacceptable character #x0000"),
            ("iters: " + "9" * 5000, r"Exceeds the limit \(4300 digits\)"),
            ("[" * 60000, r"recursion"),
        ],
    )
    def test_what_is_no_yaml(self, write: Write, content: str | bytes, message: str) -> None:
        assert re.search(f"^FILE is not usable YAML: .*{message}", refusal(write(content)))

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        path = tmp_path / "no.yaml"
        with pytest.raises(ConfigError) as error:
            load_config(path, {})
        expected = (
            f"Cannot read the configuration {path}: No such file or directory. Give the path of a "
            f"YAML file, such as one of `nested-tune init --data DATA --model MODEL -o FILE`."
        )
        assert str(error.value) == expected

    @given(content=st.binary(max_size=40) | yaml_like)
    def test_any_bytes_are_a_mapping_or_a_configuration_error(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "any.yaml"
        path.write_bytes(content)
        with suppress(ConfigError):
            assert isinstance(read_yaml(path), dict)


def test_mlx_lm_own_example_is_taken_as_it_is(write: Write) -> None:
    """The keys of mlx-lm's lora_config.yaml, with those values that are ours to train."""
    content: Any = """
model: "mlx-community/Llama-3.2-1B-Instruct"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw: {betas: [0.9, 0.98], eps: 1e-6, weight_decay: 0.05, bias_correction: true}
data: "mlx-community/WikiSQL"
lora_parameters: {keys: ["self_attn.q_proj", "self_attn.v_proj"], rank: 8, scale: 20.0, dropout: 0}
lr_schedule: {name: cosine_decay, warmup: 100, warmup_init: 1e-7, arguments: [1e-5, 1000, 1e-7]}
resume_adapter_file: null
adapter_path: "adapters"
"""
    config = load_config(write(content), {})
    assert config.optimizer_arguments["eps"] == 1e-6
    assert config.lora_parameters.modules == ("self_attn.q_proj", "self_attn.v_proj")
    assert config.lr_schedule is not None
    assert config.lr_schedule.warmup_init == 1e-7
    assert (config.adapter_path, config.resume_adapter_file) == ("adapters", None)


def test_what_a_run_keeps_of_a_configuration_is_readable_in_any_language() -> None:
    config = load_config(None, {"model": "módel 模型", "data": "d"})
    assert "model: módel 模型\n" in render_config(config).decode()


@pytest.mark.parametrize(
    "text",
    [
        "<<: {iters: 5}\niters: 7\n",
        "nested: {<<: {fast: deep}, fast: shallow}\n",
        "<<: [{iters: 5}, {seed: 1}]\n",
        "lora_parameters:\n  <<: {rank: 4}\n",
    ],
)
def test_a_merge_is_refused_where_it_stands(write: Write, text: str) -> None:
    line = text.count("\n", 0, text.index("<<")) + 1
    refused = refusal(write(text))
    assert f"line {line}, column " in refused
    assert "a merge (<<) is not allowed here" in refused


@pytest.mark.parametrize("text", ["1:30:00", "0x10", "0b11", "0o10", "190:20:30.15", "1:30"])
def test_what_only_some_readers_take_for_a_number_is_none(write: Write, text: str) -> None:
    assert parse_yaml(text) == text
    assert "iters: " in refusal(write(f"iters: {text}\n"))


@pytest.mark.parametrize("text", ["010", "-07", "0_1", "00"])
def test_a_number_that_may_be_octal_is_refused_and_a_quoted_one_is_text(write, text) -> None:
    assert f"{text}, which is octal to some readers" in refusal(write(f"iters: {text}\n"))
    assert parse_yaml(f"'{text}'") == text


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "y", "n", "2026-11-21", "1_000", "="])
def test_words_and_dates_of_yaml_1_1_are_text(word: str) -> None:
    assert parse_yaml(word) == word
    assert parse_yaml(f"{{{word}: 1}}") == {word: 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("12", 12), ("-3", -3), ("+3", 3), ("0", 0), ("1.5", 1.5), ("1.", 1.0), (".5", 0.5)),
        *(("1e-5", 1e-5), ("1.5E+3", 1500.0), ("-1e5", -1e5), ("0.1", 0.1), ("-.5e1", -5.0)),
        *(("true", True), ("False", False), ("null", None), ("~", None), ("", None)),
    ],
)
def test_numbers_booleans_and_null_are_what_they_look_like(text: str, value: object) -> None:
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_switch_of_mlx_lms_yaml_may_be_yes_or_on(write: Write) -> None:
    config = load_config(write("mask_prompt: yes\ngrad_checkpoint: off\niters: 1_000\n"))
    assert (config.mask_prompt, config.grad_checkpoint, config.iters) == (True, False, 1000)


def test_a_nul_in_a_path_is_refused_by_its_key(write: Write) -> None:
    refused = refusal(write('data: "a\\0b"\nregistry: {path: "r\\0", name: n}\n'))
    assert "data: a NUL character is in no path" in refused
    assert "registry.path: a NUL character is in no path" in refused


REFUSED = """\
model: m
learning_rte: 3
nested:
  frequencies: [1, 2]
  learning_rate_scale: [1]
batch_size: 3
hf_dataset:
  - {path: a, train_split: train, valid_split: valid}
  - path: b
    trian_split: train
training:
  processes: 2
  supervise: some
continual: {from: champion}
"""


def refused_lines(path: Path, **flags: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(path, flags)
    return str(error.value).splitlines()[1:]


def test_every_problem_is_told_at_once_with_its_line(write: Write) -> None:
    found = {line.split(":")[0].strip(): line for line in refused_lines(write(REFUSED))}
    assert found["learning_rte"].endswith("did you mean learning_rate? (line 2)")
    assert found["nested"].endswith(
        "learning_rate_scale needs one number a tier (2), got 1 (line 5)"
    )
    assert found["hf_dataset.1.trian_split"].endswith("did you mean train_split? (line 10)")
    assert found["training.supervise"].endswith("found 'some' (line 13)")


@needs_rooms("ranks")
def test_what_keys_ask_of_each_other_is_told_beside_what_is_wrong_with_one(write: Write) -> None:
    found = refused_lines(write(REFUSED))
    assert "  continual.from: champion needs a registry path and name" in found
    assert any("training.processes 2 does not divide it" in line for line in found)


def test_a_default_in_the_place_of_a_refused_value_is_blamed_for_nothing(write: Write) -> None:
    path = write("registry: {path: 3, name: a}\ncontinual: {from: champion}\n")
    assert refused_lines(path) == [
        "  registry.path: Input should be a valid string; found 3 (line 1)"
    ]


def test_a_flag_in_a_section_of_the_file_is_refused_by_its_own_name(write: Write) -> None:
    path = write("lora_parameters:\n  rank: 8\ngate:\n  tasks:\n  - {name: a, min: 3}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, {"lora_parameters.rank": 0, "gate.tasks": [{"name": "a", "min": 90}]})
    first, *lines = str(error.value).splitlines()
    assert first == "The command line cannot be used:"
    assert lines[0].endswith("found 0 (--lora-parameters.rank)")
    assert lines[1].startswith("  gate.tasks.0")
    assert all(line.endswith(" (--gate.tasks)") for line in lines[1:])


def test_a_flag_that_is_refused_has_no_line(write: Write) -> None:
    path = write("iters: 3\nbatch_size: 0\n")
    assert refused_lines(path, iters=0) == [
        "  batch_size: Input should be greater than 0; found 0 (line 2)",
        "  iters: Input should be greater than 0; found 0 (--iters)",
    ]


def test_a_key_of_the_top_level_that_stands_in_a_section_is_told_its_place(write: Write) -> None:
    (line,) = refused_lines(write("training: {batch_size: 4}\n"))
    assert line.startswith("  training.batch_size: unknown key; did you mean batch_size at the top")
