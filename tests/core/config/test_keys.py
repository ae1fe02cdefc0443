"""What is derived from a key's line: resume, continual runs, paths and docs/configuration.md."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path
from typing import Any

import pytest

from nested_core import ConfigError, FineTuneConfig
from nested_core.config.key_properties import (
    iterate_configured_paths,
    iterate_keys,
    settings_that_make_loss,
    settings_that_shape_adapter,
)
from nested_core.config.loading import parse_config
from nested_core.config.resume import refuse_differences_on_resume
from nested_core.config.section_base import Section, key
from nested_core.pipeline.continual import settings_digest
from nested_core.records.dataset import DatasetReport, read_dataset_record
from nested_core.storage.atomic import canonical_json, write_json
from nested_core.storage.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[3]
FREE_ON_RESUME = {
    *("iters", "steps_per_report", "save_every", "test", "test_batches", "adapter_path", "gate"),
    *("registry", "report_to", "project_name", "clear_cache_threshold", "train"),
    "samples",
}
NOT_IN_THE_DIGEST = {
    *("data", "model", "train", "test", "test_batches", "adapter_path", "report_to"),
    *("project_name", "steps_per_report", "save_every", "clear_cache_threshold"),
    *("trust_remote_code", "registry", "continual", "gate", "samples"),
}
CHANGED: dict[str, Any] = {
    "fine_tune_type": "dora",
    "optimizer": "adamw",
    "optimizer_config": {"adam": {"eps": 1e-7}},
    "lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 100]},
    "lora_parameters": {"rank": 4},
    "hf_dataset": {"path": "owner/name"},
    "nested": {"frequencies": [1, 2]},
    "training": {"keep_checkpoints": 7},
    "samples": ["Who?"],
    "data_format": "alpaca",
    "data_policy": {"overlong": "drop"},
    "gate": {"max_val_loss_increase": 0.5},
    "registry": {"path": "registry", "name": "capitals"},
    "continual": {"skip_unchanged": False},
}


def changed(name: str) -> FineTuneConfig:
    """A configuration that differs from the default in one top-level key alone."""
    default = getattr(FineTuneConfig(), name)
    if name in CHANGED:
        value = CHANGED[name]
    elif isinstance(default, bool):
        value = not default
    elif isinstance(default, int | float):
        value = default * 2 + 1
    else:
        value = "other"
    return parse_config({name: value}, source="a test")


@pytest.mark.parametrize("name", FineTuneConfig.model_fields)
def test_a_key_may_differ_on_resume_or_is_refused_by_name(name: str) -> None:
    if name in FREE_ON_RESUME:
        refuse_differences_on_resume(FineTuneConfig(), changed(name), Path("run"))
        return
    with pytest.raises(ConfigError, match=rf"cannot be resumed .*\n  {name}[.: ]"):
        refuse_differences_on_resume(FineTuneConfig(), changed(name), Path("run"))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run whose data was tokenised."""
    run = RunDirectory(tmp_path)
    write_json(run.dataset, DatasetReport("data", "0", {}, (), tokenizer="tokenizer").to_json())
    return run


@pytest.mark.parametrize("name", FineTuneConfig.model_fields)
def test_a_key_changes_the_digest_of_settings_or_the_adapter_does_not_depend_on_it(
    name: str, run: RunDirectory
) -> None:
    before, after = (
        settings_digest(each, "base", run, read_dataset_record(run.dataset))
        for each in (FineTuneConfig(), changed(name))
    )
    assert (before == after) == (name in NOT_IN_THE_DIGEST)


def test_the_digest_is_over_the_base_its_tokenizer_and_all_settings_that_shape_an_adapter(
    run: RunDirectory,
) -> None:
    config = parse_config(CHANGED | {"optimizer": "adam"}, source="a test")
    values = config.model_dump(mode="json", exclude=NOT_IN_THE_DIGEST)
    settings = settings_that_shape_adapter(config)
    followed = settings.pop("continual")
    assert followed.keys() == {"rate", "replay"}  # of which replay counts where there is any
    assert settings.keys() == values.keys()
    assert all(settings[name] == values[name] for name in values if name != "training")
    assert settings["training"].items() <= values["training"].items()
    expected = hashlib.sha256(
        canonical_json(["base", "tokenizer", settings, followed["rate"], "continue"])
    ).hexdigest()
    assert settings_digest(config, "base", run, read_dataset_record(run.dataset)) == expected


class Inner(Section):
    """A section whose keys differ in what they affect."""

    rate: float = key(1.0, "changes the adapter")
    report: str = key("a", "changes what is printed", affects="output")


class Outer(Section):
    """A configuration with a section."""

    inner: Inner = key(Inner(), "a section")


def test_a_key_of_a_section_has_its_own_place_or_else_the_section_s() -> None:
    assert {each.name: each.affects for each in iterate_keys(Outer)} == {
        "inner": "training",
        "inner.rate": "training",
        "inner.report": "output",
    }
    assert settings_that_shape_adapter(Outer()) == {"inner": {"rate": 1.0}}


def test_each_key_says_what_it_makes_of_a_loss() -> None:
    keys = {each.name: each.in_loss for each in iterate_keys(FineTuneConfig) if each.in_loss}
    rows = {name for name, in_loss in keys.items() if in_loss == "rows"}
    assert rows >= {"data", "hf_dataset", "hf_dataset.train_split", "val_batches", "gate.held_out"}
    assert keys.keys() - rows == {
        *("model", "trust_remote_code", "max_seq_length", "mask_prompt", "data_format"),
        *("prompt_feature", "completion_feature", "text_feature", "chat_feature", "drop_fields"),
        *("data_policy.overlong", "data_policy.roles"),
        *("training.loss", "training.loss_config", "training.supervise", "training.precision"),
        "training.reference",
    }
    config = parse_config({"max_seq_length": 64}, source="a test")
    made_of = settings_that_make_loss(FineTuneConfig, config.model_dump(mode="json"))
    assert (made_of["max_seq_length"], made_of["training.loss_config"]) == (64, {})
    assert not {"model", "data", "val_batches"} & made_of.keys()
    assert settings_that_make_loss(FineTuneConfig, {}) == dict.fromkeys(
        made_of
    )  # keys that were not there yet


def test_files_in_a_list_are_paths_and_the_word_lineage_is_none() -> None:
    def paths(sources: Any) -> list[tuple[str, str]]:
        section = {"continual": {"replay": {"sources": sources}}}
        found = iterate_configured_paths(parse_config(section, source="a test"))
        return [(name, value) for name, _, value in found if name.startswith("continual")]

    listed = [("continual.replay.sources[0]", "a"), ("continual.replay.sources[1]", "/b")]
    assert paths(["a", "/b"]) == listed
    assert paths("~/c") == [("continual.replay.sources[0]", str(Path("~/c").expanduser()))]
    assert paths("lineage") == []


def test_every_key_has_a_sentence() -> None:
    assert [each.name for each in iterate_keys(FineTuneConfig) if not each.field.description] == []


@pytest.mark.usefixtures("own_random_state")  # libraries draw from it when they are imported
@pytest.mark.parametrize(
    ("name", "function"),
    [("configuration.md", "render_page"), ("coming-from.md", "render_others_page")],
)
def test_a_page_that_is_made_from_the_schema_is_what_it_says(name: str, function: str) -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))[function]()
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == text, f"docs/{name} is out of date: run `make docs`"
