"""From a verified run to a version, and to champion only where the policy says so."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from nested_core import ConfigError, DamagedError, FineTuneConfig, NestedTuneError, read_adapter
from nested_core.config.loading import render_config
from nested_core.pipeline import publishing, steps
from nested_core.pipeline.continual import champion_or_none
from nested_core.pipeline.publishing import (
    describe_changed_held_out,
    describe_reproduction,
    is_registered_from,
    make_provenance,
    read_run_examples,
    register_and_promote_run,
    register_run,
)
from nested_core.pipeline.steps import write_run_config
from nested_core.records.dataset import DatasetReport, SplitStats
from nested_core.records.judged_run import read_judged_run
from nested_core.records.run_status import Run
from nested_core.registry import Decision, list_versions, promotion_outcome, registration
from nested_core.registry.data_store import DigestList, RunExamples, render_row
from nested_core.registry.folders import create_name_folder
from nested_core.registry.link_and_views import writing
from nested_core.registry.promotion_policy import compare_losses, describe_promotion, read_candidate
from nested_core.report.outcome import list_row
from nested_core.seams import is_there
from nested_core.storage.adapter import ADAPTER_FILES, write_adapter
from nested_core.storage.atomic import write_bytes, write_json
from nested_core.storage.manifest import describe_file
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import regular_sha256
from tests.builders.data_sets import load, write_lines
from tests.builders.registering import promote
from tests.core.registry.conftest import digest_row
from tests.core.report.verdicts import SUITE
from tests.example import DATA, SMALL_RUN, example_config, train_example
from tests.gate_files import judged_files, read_gate, write_gate
from tests.left_out import needs_rooms
from tests.registry_care import collect_garbage
from tests.runs import not_registered

NAME = "capitals"
SECONDS_FOR_A_GC = 0.25  # it takes some milliseconds, and all of this where it has to wait
MakeRun = Callable[..., RunDirectory]
Configure = Callable[..., FineTuneConfig]


def test_all_held_out_rows_are_kept_and_those_that_the_gate_judged_by_apart(tmp_path: Path) -> None:
    rows = {
        split: {"prompt": f"{split}?", "completion": "Yes."} for split in ("train", "valid", "test")
    }
    for split, row in rows.items():
        write_lines(tmp_path / "data" / f"{split}.jsonl", [row])
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    report, _ = load(tmp_path / "data")
    write_json(run.dataset, report.to_json())
    for choice, judged, other in (("auto", "test", "valid"), ("valid", "valid", "test")):
        registry = {"path": str(tmp_path / "registry"), "name": NAME}
        settings = {"data": str(tmp_path / "data"), "gate": {"held_out": choice}}
        config = example_config(**settings, registry=registry)
        examples = read_run_examples(config, not_registered(run))
        assert examples is not None
        stored = {(digest_row(row), render_row(row) + b"\n") for row in rows.values()}
        assert {*examples.lines()} == stored
        sets = {"train": "train", "held_out": judged, "kept_out": other}
        digests = {name: [digest_row(rows[split])] for name, split in sets.items()}
        assert examples.listed == DigestList.model_validate(digests)


def test_of_a_file_of_its_own_the_rows_that_judged_are_kept_or_none(tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    shutil.copy(DATA / "valid.jsonl", held_out)
    judged_file = regular_sha256(held_out)
    registry = {"path": str(tmp_path / "registry"), "name": NAME}
    gate = {"held_out": str(held_out)}
    done = train_example(tmp_path / "run", **SMALL_RUN, gate=gate, registry=registry)
    steps.judge(done.config, done.run)
    judged = read_judged_run(done.run.path)
    examples = read_run_examples(done.config, judged)
    assert examples is not None
    assert len(examples.listed.held_out) == len(held_out.read_text().splitlines())
    held_out.write_text(held_out.read_text().splitlines(keepends=True)[0])
    with pytest.warns(UserWarning, match="held-out.jsonl has changed since the gate judged by it"):
        changed = read_run_examples(done.config, judged)
    assert changed is not None
    assert (changed.listed.all(), changed.listed.dropped > 0) == (set(), True)
    recorded = make_provenance(done.config, judged, None)
    assert recorded["validation_digest"] == judged_file != regular_sha256(held_out)


def test_without_room_for_its_rows_a_run_is_not_registered_without_them(tmp_path, monkeypatch):
    write_lines(tmp_path / "data" / "train.jsonl", [{"prompt": "Who?", "completion": "Me."}])
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    report, _ = load(tmp_path / "data")
    write_json(run.dataset, report.to_json())
    registry = {"path": str(tmp_path / "registry"), "name": NAME}
    config = example_config(data=str(tmp_path / "data"), registry=registry)

    def is_full(examples: RunExamples, name: str, rows: Any) -> None:
        for _ in rows:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunExamples, "add", is_full)
    with pytest.raises(OSError, match="No space left"):
        read_run_examples(config, not_registered(run))


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a finished run whose adapter depends on `value`, by hand."""

    def make(
        value: float,
        *,
        loss: float | None = 1.0,
        data: str = "d1",
        verdict: str = "passed",
        initial_digest: str = "0" * 64,
        tasks: Sequence[dict[str, Any]] = (),
        base: str | None = "b1",
        vocabulary: str | None = "v1",
    ) -> RunDirectory:
        run = RunDirectory(tmp_path / f"run-{value}")
        run.adapter.mkdir(parents=True)
        config: Any = {"num_layers": 1, "lora_parameters": {"rank": 1, "scale": 20.0}}
        config["base_fingerprint"] = base
        write_adapter(run.adapter, {"layers.0.lora_a": mx.full((2,), value)}, config)
        validation = None if loss is None else losses_that_fell_to(loss)
        trained = {"path": "adapter", "digest": read_adapter(run.adapter).digest()}
        initial = {"path": "initial", "digest": initial_digest}
        reasons = [{"code": "unchanged", "message": "Nothing moved."}]
        gate: Any = {"verdict": verdict, "reasons": [] if verdict == "passed" else reasons}
        gate |= {"initial": initial, "adapter_step": 8, "tensors": [], "tasks": list(tasks)}
        judged = {f"adapter/{name}": describe_file(run.adapter / name) for name in ADAPTER_FILES}
        write_gate(run.path, gate | {"trained": trained, "validation": validation}, judged)
        splits = {
            name: SplitStats(f"{name}.jsonl", "chat", 1, 0, 0, 1, {}, data)
            for name in ("train", "valid")
        }
        write_json(
            run.dataset, DatasetReport("data", data, splits, (), vocabulary=vocabulary).to_json()
        )
        run.config.write_text("model: m\nregistry: {keep_data: false}\n")
        return run

    return make


def losses_that_fell_to(loss: float) -> dict[str, Any]:
    """The comparison of a verdict, from a loss of 4 nats/token."""
    difference = loss - 4.0
    return {
        "loss_before": 4.0,
        "loss_after": loss,
        "selected_on_same_data": True,
        "file": "valid.jsonl",
        "examples": 84,
        "difference": difference,
        "interval": [difference - 0.1, difference + 0.1],
        "one_sided_high": difference + 0.08,
        "smallest_visible": 0.1,
        "conclusion": "better",
    }


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """A configuration with a registry, and these further keys in its section."""

    def configure(**section: Any) -> FineTuneConfig:
        target = {"path": str(tmp_path / "registry"), "name": NAME, "keep_data": False}
        return FineTuneConfig.model_validate({"registry": target | section})

    return configure


@pytest.fixture
def publish(configure: Configure) -> Callable[..., Decision]:
    """Register a run and let the policy decide; the champion now is the one it was judged with."""

    def publish(run: RunDirectory, **section: Any) -> Decision:
        config = configure(**section)
        champion = champion_or_none(Path(str(config.registry.path)), NAME)
        return register_run(config, read_judged_run(run.path), champion)

    return publish


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (
            {"candidate": 0.2, "constant": 0.2},
            r"above the base's.*3 of 15 right \(one fixed answer: 3",
        ),
        (
            {"champion_difference": -1 / 15, "conclusion": "inconclusive"},
            "worse than the champion's",
        ),
    ],
)
def test_better_needs_answers_that_show_learning_and_are_no_worse_than_the_champions(
    make_run, publish, tmp_path: Path, fields, why
) -> None:
    champion = {"champion": 1.0} if "champion_difference" in fields else {}
    run = make_run(1.0, tasks=[SUITE | {"constant": 0.2} | champion | fields])
    assert re.search(why, outcome(publish(run, promote="better")))
    done = publish(run, promote="always")
    assert outcome(done).startswith("promoted")
    if "candidate" in fields:
        assert "3 of 15 right" in (warning(tmp_path / "registry", done) or "")


def outcome(result: Decision) -> str:
    return result.sentence


def warning(registry: Path, done: Decision) -> str | None:
    return describe_promotion(registry, NAME, done).warning


class TestRegister:
    def test_rows_that_another_process_removed_before_the_lock_stop_it(
        self, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        section = {"path": str(tmp_path / "registry"), "name": NAME}
        config = example_config(data=str(DATA), registry=section)
        monkeypatch.setattr(publishing, "read_run_examples", lambda *_: None)  # they are stored
        with pytest.raises(NestedTuneError, match="nothing was registered"):
            register_run(config, read_judged_run(make_run(1.0).path), None)
        assert list_versions(tmp_path / "registry", NAME) == []

    def test_rows_that_were_forgotten_while_they_were_read_stop_it(
        self, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registry = tmp_path / "registry"
        config = example_config(data=str(DATA), registry={"path": str(registry), "name": NAME})
        create_name_folder(registry, NAME)

        def forget_meanwhile(*_: Any) -> RunExamples:
            with writing(registry, NAME) as locked:
                locked.record("rows_forgotten", None, "ann", reason="1 row")
            return RunExamples((), ())

        monkeypatch.setattr(publishing, "read_run_examples", forget_meanwhile)
        with pytest.raises(NestedTuneError, match="nothing was registered"):
            register_run(config, read_judged_run(make_run(1.0).path), None)
        assert list_versions(registry, NAME) == []

    def test_the_version_says_where_it_comes_from(self, make_run, configure, tmp_path) -> None:
        config, first, second = configure(), make_run(1.0), make_run(2.0, data="d2")
        parent = register_run(config, read_judged_run(first.path), None).version
        promote(tmp_path / "registry", NAME, parent, by="ann")
        version = register_run(config, read_judged_run(second.path), parent).version
        folder = tmp_path / "registry" / NAME / "versions" / version
        written = json.loads((folder / "provenance.json").read_text())
        assert version == read_adapter(second.adapter).digest()
        assert (
            written.items()
            >= json.loads(
                json.dumps(make_provenance(config, read_judged_run(second.path), parent))
            ).items()
        )
        assert written["run_dir"] == str(second.path)
        assert (written["dataset_digest"], written["parent"]) == ("d2", parent)
        assert written["gate_sha256"] == regular_sha256(second.gate)
        assert written["config"]["registry"]["name"] == NAME
        assert written["packages"]["mlx"].startswith("0.")

    def test_the_time_in_steps_is_recorded(self, make_run: MakeRun, configure: Configure) -> None:
        run = make_run(1.0)
        reports = [(10, 5.0), (20, 2.0)]
        lines = [{"iteration": i, "iterations_per_second": speed} for i, speed in reports]
        lines.insert(0, {"iteration": 0, "val_loss": 3.0})
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert (
            make_provenance(configure(), read_judged_run(run.path), None)["training_seconds"]
            == 2.0 + 5.0
        )

    def test_a_training_is_told_from_another_wherever_its_folder_lies(
        self, make_run: MakeRun, configure: Configure, tmp_path: Path
    ) -> None:
        config, run = configure(), make_run(1.0)
        run.metrics.write_text('{"iteration": 10, "iterations_per_second": 5.0}\n')
        version = register_run(config, read_judged_run(run.path), None).version
        moved = RunDirectory(run.path.rename(tmp_path / "moved"))
        write_gate(moved.path, read_gate(moved.gate), judged_files(moved.path))  # judged again
        assert is_registered_from(config, moved, version)
        assert describe_reproduction(config, read_judged_run(moved.path)) is None
        again = make_run(1.0)  # where the first one was, and of the same adapter
        again.metrics.write_text('{"iteration": 10, "iterations_per_second": 5.1}\n')
        assert not is_registered_from(config, again, version)
        said = f"made the same adapter, byte for byte, as {run.path}, which was registered"
        assert said in str(describe_reproduction(config, read_judged_run(again.path)))

    def test_without_a_registry_it_says_what_is_needed(self, make_run: MakeRun) -> None:
        with pytest.raises(ConfigError, match="registry: path and name are needed to register"):
            register_run(FineTuneConfig(), read_judged_run(make_run(1.0).path), None)


class TestPolicy:
    def test_always_does_not_ask_whether_it_is_better(self, make_run, publish) -> None:
        publish(make_run(1.0, loss=1.0), promote="always")
        assert outcome(publish(make_run(2.0, loss=3.0), promote="always")) == "promoted"

    @pytest.mark.parametrize("few", [{"clusters": 4}, {"clusters": 84, "few_prompts": 4}])
    @pytest.mark.parametrize("rival", ["its start", "the champion"])
    def test_few_prompts_promote_nothing_by_themselves(self, make_run, publish, few, rival) -> None:
        champion = publish(make_run(1.0), promote="always").version
        run = make_run(2.0)
        gate = read_gate(run.gate)
        gate["champion"] = {"version": champion, "loss": 1.5, "examples": 84, "difference": -0.5}
        gate["champion"] |= {"interval": [-0.6, -0.4], "clusters": 84}
        gate["validation" if rival == "its start" else "champion"] |= few
        if rival == "its start":
            gate["champion"] = {"version": champion, "not_compared": "it does not fit"}
        write_gate(run.path, gate, judged_files(run.path))
        said = outcome(publish(run, promote="always"))
        assert "4 different prompts: on fewer than 5 nothing is promoted by itself" in said
        if is_there("approval"):
            assert outcome(publish(run, promote="approve")).startswith("waiting for approval")
        if rival == "the champion":
            for leave in ({}, {"require_validation": False}):
                assert "4 different prompts" in outcome(publish(run, promote="better", **leave))
        always = {"promote": "always", "require_validation": False}
        assert outcome(publish(run, **always)) == "promoted"

    @pytest.mark.parametrize("promote", ["always", "better"])
    def test_without_validation_only_by_leave(self, make_run, publish, promote) -> None:
        run = make_run(1.0, loss=None)
        assert outcome(publish(run, promote=promote)) == (
            "there was no validation set, and registry.require_validation is on"
        )
        result = outcome(publish(run, promote=promote, require_validation=False))
        if promote == "always":
            assert result == "promoted"
        else:
            assert result.startswith("there is no validation loss to compare with that of the")

    @pytest.mark.parametrize(
        ("difference", "interval", "corrected", "expected"),
        [
            (-0.5, [-0.6, -0.4], None, "promoted"),
            (-0.5, [-0.6, -0.4], [-0.9, -0.1], "promoted"),
            (-0.5, [-0.6, -0.4], [-1.1, 0.1], "chose among; a test.jsonl needs no correction"),
            (1.5, [1.4, 1.6], None, "not better by more than 0.005 than that of the adapter it"),
            (-0.1, [-0.3, 0.1], None, "-0.1 with a 95 % interval of -0.3 to +0.1"),
            (
                *(-0.004, [-0.005, -0.003], None),
                "lower, by 0.004, and registry.min_improvement asks for more than 0.005",
            ),
            (-0.1, None, None, "too few to detect a difference"),
        ],
    )
    def test_a_first_version_has_to_be_better_than_it_began(
        self, make_run, publish, difference, interval, corrected, expected
    ) -> None:
        run = make_run(2.0, loss=4.0 + difference)
        gate = read_gate(run.gate)
        figures = {"difference": difference, "interval": interval, "chosen_among": 24}
        gate["validation"] |= figures | {"corrected_interval": corrected, "smallest_visible": 0.1}
        gate["thresholds"] = {"noise": "paired"}
        write_gate(run.path, gate, judged_files(run.path))
        assert expected in outcome(publish(run, promote="better"))
        assert outcome(publish(run, promote="always")) in ("promoted", "already_champion")

    @pytest.mark.parametrize(
        ("record", "noise", "improvement", "expected"),
        [
            ({"interval": [-0.3, -0.01]}, "paired", 0.0, "promoted"),
            ({"interval": [-0.3, -0.01]}, "paired", 0.05, "promoted"),
            ({"interval": [-0.3, -0.01]}, "paired", 0.2, "is not better by more than 0.2"),
            ({"interval": [-0.3, 0.1]}, "paired", 0.0, "-0.1 with a 95 % interval of -0.3 to +0.1"),
            ({"interval": [-0.3, 0.1]}, "none", 0.0, "promoted"),
            ({"interval": [-0.3, 0.1]}, "none", 0.2, "0.9 is not better by more than 0.2 than the"),
            ({"interval": None, "examples": 3}, "paired", 0.0, "3 examples): too few to detect"),
            ({"left_out": 2}, "paired", 0.0, "84 examples, 2 left out that an adapter was trained"),
            ({"version": "f" * 64}, "paired", 0.0, "the gate did not evaluate the champion"),
            ({"loss": None, "not_compared": "the champion is gone"}, "paired", 0.0, "is gone"),
        ],
    )
    def test_better_is_decided_beyond_noise_where_the_gate_judged_the_champion(
        self, make_run, publish, record, noise, improvement, expected
    ) -> None:
        policy = {"promote": "better", "min_improvement": improvement}
        champion = publish(make_run(1.0), **policy).version
        run = make_run(2.0, loss=0.9, data="d2")
        gate = read_gate(run.gate)
        compared = {"version": champion, "loss": 1.0, "examples": 84, "difference": -0.1}
        compared |= {"interval": [-0.3, 0.1], "smallest_visible": 0.2}
        gate |= {"champion": compared | record, "thresholds": {"noise": noise}}
        write_gate(run.path, gate, judged_files(run.path))
        assert expected in outcome(publish(run, **policy))

    def test_a_champion_that_was_changed_is_compared_with_no_more(
        self, make_run: MakeRun, publish: Any, tmp_path: Path
    ) -> None:
        champion = publish(make_run(1.0, loss=1.0), promote="better").version
        path = tmp_path / "registry" / NAME / "versions" / champion / "gate.json"
        path.chmod(0o644)
        path.write_text(path.read_text().replace("1.0", "9.0"))
        version = publish(make_run(2.0, loss=2.0), promote="always").version
        registry = tmp_path / "registry"
        candidate = read_candidate(registry, NAME, version)
        with pytest.raises(DamagedError, match="gate.json: has changed"):
            compare_losses(registry, NAME, candidate, champion)


class TestPromotionByAPerson:
    """`nested-tune promote RUN_DIR`: one lock from register to promote, and a warning if worse."""

    @pytest.fixture
    def by_hand(self, tmp_path, monkeypatch) -> Callable[[RunDirectory], Decision]:
        """Promote a run whose files were written by hand: they hold no evidence to confirm."""
        monkeypatch.setattr(
            publishing, "confirm_recorded_verdict", lambda config, run: read_judged_run(run.path)
        )
        registry = tmp_path / "registry"
        return lambda run: register_and_promote_run(run, registry, NAME, by="ann")[0]

    def test_rows_that_another_process_removed_before_the_lock_stop_it(
        self, make_run: MakeRun, by_hand: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(publishing, "read_run_examples", lambda *_: None)  # they are stored
        run = make_run(1.0)
        run.config.write_text(run.config.read_text().replace("keep_data: false", "keep_data: true"))
        with pytest.raises(NestedTuneError, match="Promote the run again"):
            by_hand(run)
        assert list_versions(tmp_path / "registry", NAME) == []

    @pytest.mark.parametrize(
        ("before", "after", "is_warned"),
        [(3.458, 4.075, True), (3.458, 3.4581, True), (3.458, 3.458, False), (4.0, 3.0, False)],
    )
    def test_a_higher_loss_on_the_same_data_is_promoted_with_a_warning(
        self, make_run, by_hand, tmp_path, before, after, is_warned
    ) -> None:
        registry = tmp_path / "registry"
        first = by_hand(make_run(1.0, loss=before))
        assert warning(registry, first) is None
        done = by_hand(make_run(2.0, loss=after))
        assert done.outcome == "promoted"
        said = warning(registry, done)
        assert (said is not None) == is_warned
        if said is not None:
            assert f"a higher validation loss on the same data, {after:.4g}, than the" in said
            assert f"{first.version[:12]}, {before:.4g}. To go back: `nested-tune roll" in said
        assert warning(registry, by_hand(make_run(3.0, loss=0.5))) is None

    def test_losses_on_other_data_or_none_are_no_reason_to_warn(
        self, make_run: MakeRun, by_hand: Any, tmp_path: Path
    ) -> None:
        by_hand(make_run(1.0, loss=1.0))
        for run in (make_run(2.0, loss=5.0, data="d2"), make_run(3.0, loss=None)):
            assert warning(tmp_path / "registry", by_hand(run)) is None

    @pytest.mark.parametrize(
        "other",
        [
            {"config": "mask_prompt: true"},
            {"config": "training: {supervise: all}"},
            {"config": "max_seq_length: 64"},
            {"left_out": 4, "examples": 80},
            {"left_out": None},
            {"base": "b2"},
            {"base": None},
            {"vocabulary": "v2"},
            {"vocabulary": None},
        ],
        ids=str,
    )
    def test_losses_that_were_measured_otherwise_are_not_compared(
        self, make_run: MakeRun, by_hand: Any, tmp_path: Path, other: dict[str, Any]
    ) -> None:
        made = {key: other[key] for key in ("base", "vocabulary") if key in other}
        by_hand(make_run(1.0, loss=1.0, **{key: n for key, n in made.items() if n is None}))
        run = make_run(2.0, loss=5.0, **made)
        with run.config.open("a") as config:
            config.write(other.get("config", ""))
        gate = read_gate(run.gate)
        gate["validation"] |= {
            key: n for key, n in other.items() if key in ("left_out", "examples")
        }
        write_gate(run.path, gate, judged_files(run.path))
        done = by_hand(run)
        notes = describe_promotion(tmp_path / "registry", NAME, done)
        assert (done.outcome, notes.warning) == ("promoted", None)
        assert "the champion before, has no loss that was measured alike" in str(notes.losses)

    def test_an_adapter_that_was_never_measured_is_said_to_be_so_beside_the_one_that_was(
        self, make_run: MakeRun, by_hand: Any, tmp_path: Path
    ) -> None:
        registry = tmp_path / "registry"
        first = by_hand(make_run(1.0, loss=0.75))
        done = by_hand(make_run(2.0, loss=None))
        said = str(describe_promotion(registry, NAME, done).losses)
        assert said.startswith(f"{done.version[:12]}: passed, quality not measured; the")
        assert f"the champion before, {first.version[:12]}, has a validation loss of 0.75" in said
        assert f"nested-tune rollback {NAME}" in said

    def test_a_champion_that_is_damaged_is_replaced_without_a_comparison(
        self, make_run: MakeRun, by_hand: Any, tmp_path: Path
    ) -> None:
        first = by_hand(make_run(1.0, loss=1.0))
        path = tmp_path / "registry" / NAME / "versions" / first.version / "gate.json"
        path.chmod(0o644)
        path.write_text("{")
        done = by_hand(make_run(2.0, loss=5.0))
        assert warning(tmp_path / "registry", done) is None

    @needs_rooms("housekeeping")
    def test_a_gc_that_keeps_nothing_comes_before_or_after_and_never_between(
        self, make_run: MakeRun, by_hand: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registry = tmp_path / "registry"
        monkeypatch.setattr(promotion_outcome, "UNPROMOTED_GRACE_TIME", timedelta(0))
        by_hand(make_run(1.0))
        gc = threading.Thread(
            target=collect_garbage, args=(registry, NAME), kwargs={"by": "gc", "keep": 0}
        )
        add_version = registration._add_version

        def after(*arguments: Any, **options: Any) -> Any:
            state = add_version(*arguments, **options)
            gc.start()
            gc.join(SECONDS_FOR_A_GC)  # it has to wait for the lock
            return state

        monkeypatch.setattr(registration, "_add_version", after)
        assert by_hand(make_run(2.0)).outcome == "promoted"
        gc.join()
        assert len(list_versions(registry, NAME)) == 2

    def test_a_run_notes_another_registry_than_its_own(self, make_run, by_hand, tmp_path) -> None:
        for value, path in ((1.0, tmp_path / "registry"), (2.0, tmp_path / "own")):
            run = make_run(value)
            named = f"{{path: {path}, name: {NAME}, keep_data: false}}"
            run.config.write_text(f"model: m\nregistry: {named}\n")
            assert by_hand(run).outcome == "promoted"
        assert not (tmp_path / "run-1.0" / "promoted-to.json").exists()
        assert Run(run).promoted_to == ((str(tmp_path / "registry"), NAME),)
        run = make_run(3.0)
        by_hand(run)
        assert Run(run).promoted_to == ((str(tmp_path / "registry"), NAME),)

    @pytest.mark.parametrize("removed", [(), ("MANIFEST.json",), ("MANIFEST.json", "gate.json")])
    def test_a_run_with_an_adapter_that_is_resumed_under_another_registry_notes_the_first(
        self, removed: Sequence[str], make_run: MakeRun, configure: Configure, tmp_path: Path
    ) -> None:
        """Training on removes the verdict first, and so does judging again."""
        run = make_run(1.0)
        for name in removed:
            (run.path / name).unlink()
        write_bytes(run.config, render_config(configure()))
        run.tiers.write_text("{}")
        write_run_config(configure(), run, resume=True)
        assert Run(run).promoted_to == ()
        write_run_config(configure(path=str(tmp_path / "other")), run, resume=True)
        assert Run(run).promoted_to == ((str(tmp_path / "registry"), NAME),)

    def test_a_registry_is_noted_by_its_absolute_path(
        self, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, by_hand: Any, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        run = make_run(1.0)
        register_and_promote_run(run, Path("registry"), NAME, by="ann")
        assert Run(run).promoted_to == ((str(tmp_path / "registry"), NAME),)

    def test_a_run_without_a_registry_is_listed_under_the_name_that_it_was_promoted_to(
        self, make_run: MakeRun, by_hand: Any
    ) -> None:
        run = make_run(1.0)
        assert list_row(Run(run))[1:3] == (
            None,
            "Verified: passed, better loss; no questions asked",
        )
        by_hand(run)
        assert list_row(Run(run))[1:3] == (
            NAME,
            "Promoted: passed, better loss; no questions asked",
        )
        assert Run(run).to_json()["adapter"] == NAME

    def test_a_run_that_another_process_works_on_is_refused(
        self, make_run: MakeRun, by_hand: Any, tmp_path: Path
    ) -> None:
        run = make_run(1.0)
        with run.locked(), pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
            by_hand(run)
        assert not (tmp_path / "registry").exists()
        before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
        assert by_hand(run).outcome == "promoted"
        after = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
        assert after.pop(run.promoted_to)  # the note that a version names this run
        assert after == before


@pytest.mark.parametrize(("data", "is_said"), [("d1", False), ("d2", True)])
def test_held_out_examples_that_are_not_the_champions_are_said(
    make_run: MakeRun, configure: Configure, data: str, is_said: bool
) -> None:
    config = configure()
    champion = register_run(
        config, read_judged_run(judged_on(make_run(1.0), 10).path), None
    ).version
    promote(Path(str(config.registry.path)), NAME, champion, by="ann")
    judged = read_judged_run(judged_on(make_run(2.0, data=data), 16, champion).path)
    said = describe_changed_held_out(config, judged.verdict, judged.dataset)
    assert said == (
        f"valid.jsonl has changed since the champion {champion[:12]} was evaluated on it: 10 "
        f"examples then, 16 now"
        if is_said
        else None
    )


def judged_on(run: RunDirectory, examples: int, champion: str | None = None) -> RunDirectory:
    """The run, judged by so many examples of valid.jsonl and against a champion."""
    gate = read_gate(run.gate)
    gate["validation"] |= {"file": "valid.jsonl", "examples": examples}
    gate["champion"] = None if champion is None else {"version": champion}
    judged = {f"adapter/{name}": describe_file(run.adapter / name) for name in ADAPTER_FILES}
    write_gate(run.path, gate, judged)
    return run
