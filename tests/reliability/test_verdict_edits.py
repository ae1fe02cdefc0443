"""gate.json and its manifest under every edit: refused at promote, or shown to be harmless."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.errors import DamagedError, GateRejected
from nested_core.pipeline import steps
from nested_core.pipeline.publishing import confirm_recorded_verdict
from nested_core.records.verdict_file import parse_verdict
from nested_core.storage.atomic import canonical_json, render_json
from nested_core.storage.manifest import read_manifest
from nested_core.storage.run_directory import RunDirectory
from tests.builders.suites import task, write_suite
from tests.example import SMALL, train_example
from tests.gate_files import read_gate, write_gate

pytestmark = pytest.mark.slow("edits a verdict in each way")

REMOVED = object()
Keys = tuple[Any, ...]

# What `promote` computes again from the files, so that no manifest that agrees helps an edit of it.
COMPUTED_AGAIN = {
    *("verdict", "reasons", "adapter_step", "last_step", "tensors", "tiers", "thresholds"),
    *("initial", "trained"),
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[FineTuneConfig, RunDirectory]:
    """A small run that passed."""
    done = train_example(
        tmp_path_factory.mktemp("verdict") / "run", lora_parameters=SMALL, val_batches=1
    )
    steps.judge(done.config, done.run)
    return done.config, done.run


@pytest.fixture
def edited(judged, tmp_path) -> tuple[FineTuneConfig, RunDirectory]:
    """A copy of it."""
    return judged[0], RunDirectory(Path(shutil.copytree(judged[1].path, tmp_path / "run")))


def places(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """The path of every field and element, those that hold others too."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*keys, key)
        if isinstance(item, dict | list):
            yield from places(item, (*keys, key))


def edits(value: Any) -> Iterator[Any]:
    """Other values for one that stands somewhere, removal among them."""
    yield REMOVED
    others: tuple[Any, ...] = (None, "x", [], {}, -1, 0, 1e9, True)
    yield from (other for other in others if other != value)
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value + 1
        yield value * 1.5 + 1e-6
        yield str(value)
    elif isinstance(value, str):
        yield value[:-1]
        yield value.swapcase() + "0"
    elif isinstance(value, list):
        yield value + value
        yield value[1:]


def changed(document: Any, keys: Keys, value: Any) -> Any:
    """A copy of a document with one place changed."""
    made = copy.deepcopy(document)
    owner = made
    for key in keys[:-1]:
        owner = owner[key]
    if value is REMOVED:
        del owner[keys[-1]]
    else:
        owner[keys[-1]] = value
    return made


def all_edits(document: Any) -> Iterator[tuple[Keys, Any]]:
    """Each place of a document with each of its edits."""
    for keys in places(document):
        value = document
        for key in keys:
            value = value[key]
        yield from ((keys, edit) for edit in edits(value) if edit is REMOVED or edit != value)


def is_refused(config: FineTuneConfig, run: RunDirectory) -> bool:
    """Whether `promote` refuses the run, as damage or as rejected; any other error is a crash."""
    try:
        confirm_recorded_verdict(config, run)
    except (DamagedError, GateRejected):
        return True
    return False


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("every", [53, pytest.param(1, marks=pytest.mark.reliability)])
def test_every_edit_of_the_verdict_is_refused(edited, every) -> None:
    config, run = edited
    gate = read_gate(run.gate)
    outcomes: Counter[bool] = Counter()
    for keys, value in list(all_edits(gate))[::every]:
        run.gate.write_bytes(render_json(changed(gate, keys, value)))
        assert is_refused(config, run), (keys, value)
        outcomes[True] += 1
    run.gate.write_bytes(render_json(gate))
    assert not is_refused(config, run)
    print(outcomes.total())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("every", [53, pytest.param(1, marks=pytest.mark.reliability)])
def test_under_a_manifest_that_agrees_what_is_computed_again_is_refused(edited, every) -> None:
    config, run = edited
    gate, judged_files = read_gate(run.gate), read_manifest(run.path)["files"]
    own = [edit for edit in all_edits(gate) if edit[0][0] in COMPUTED_AGAIN]
    refused = 0
    for keys, value in own[::every]:
        made = changed(gate, keys, value)
        if "verdict" not in made or keys[1:] == ("path",):
            continue
        write_gate(run.path, made, judged_files)
        if is_refused(config, run):
            refused += 1
        else:
            assert says_the_same(gate, made, keys), (keys, value)
    print(refused)
    assert refused > len(own) // every // 2


def says_the_same(gate: Any, made: Any, keys: Keys) -> bool:
    """Whether an accepted edit leaves out what is the default, or a bound that was not asked."""
    path = Path("gate.json")
    if parse_verdict(made, path) == parse_verdict(gate, path):
        return True
    if keys[0] != "thresholds" or keys[1] in made["thresholds"]:
        return False
    default = GateSection().model_dump(mode="json")[str(keys[1])]
    return bool(gate["thresholds"][keys[1]] == default)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.reliability)])
def test_every_edit_of_the_manifest_is_refused(edited, every) -> None:
    """As it stands, and with a digest of itself that agrees."""
    config, run = edited
    manifest = read_manifest(run.path)
    unlisted = [(("files", name), REMOVED) for name in manifest["files"]]
    for keys, value in [*unlisted, *list(all_edits(manifest))[::every]]:
        made = changed(manifest, keys, value)
        run.manifest.write_bytes(render_json(made))
        assert is_refused(config, run), (keys, value)
        if keys[0] == "digest" or not isinstance(made.get("files"), dict):
            continue
        body = {"facts": made.get("facts"), "files": made["files"]}
        run.manifest.write_bytes(render_json(body | {"digest": sha256(body)}))
        assert is_refused(config, run), (keys, value)


def test_a_file_that_each_verdict_of_the_configuration_has_is_neither_removed_nor_unlisted(
    edited, tmp_path
) -> None:
    suite = task(write_suite(tmp_path / "suite.jsonl", count=2), canary=True, max_drop=1.0)
    gate = {"tasks": [suite]}
    other = train_example(tmp_path / "other", lora_parameters=SMALL, val_batches=1, gate=gate)
    steps.judge(other.config, other.run)
    for config, run in (edited, (other.config, other.run)):
        listed = {run.plan, run.training_examples, run.gate_losses}
        if config.gate.tasks:
            listed |= {run.suites, run.answers, run.canary}
        for path in listed:
            content, manifest = path.read_bytes(), run.manifest.read_bytes()
            made = changed(read_manifest(run.path), ("files", path.name), REMOVED)
            body = {"facts": made["facts"], "files": made["files"]}
            run.manifest.write_bytes(render_json(body | {"digest": sha256(body)}))
            assert is_refused(config, run), f"{path.name} unlisted"
            path.unlink()
            assert is_refused(config, run), f"{path.name} removed"
            run.manifest.write_bytes(manifest)
            path.write_bytes(content + b"\n")
            assert is_refused(config, run), f"{path.name} changed"
            path.write_bytes(content)
            assert not is_refused(config, run)


def sha256(body: Any) -> str:
    return hashlib.sha256(canonical_json(body)).hexdigest()


@given(is_gate=st.booleans(), place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_of_either_file_is_refused(judged, is_gate, place, flip) -> None:
    config, run = judged
    path = run.gate if is_gate else run.manifest
    content = path.read_bytes()
    spoilt = bytearray(content)
    spoilt[int(place * len(content))] ^= flip
    path.write_bytes(spoilt)
    try:
        assert is_refused(config, run)
    finally:
        path.write_bytes(content)


def test_a_verdict_of_another_run_is_refused(edited, tmp_path) -> None:
    config, run = edited
    other = train_example(tmp_path / "other", lora_parameters=SMALL, seed=1, val_batches=1)
    steps.judge(other.config, other.run)
    for names in (("gate.json",), ("MANIFEST.json",), ("gate.json", "MANIFEST.json")):
        kept = {name: (run.path / name).read_bytes() for name in names}
        for name in names:
            shutil.copyfile(other.run.path / name, run.path / name)
        assert is_refused(config, run), names
        for name, content in kept.items():
            (run.path / name).write_bytes(content)
    assert json.loads(run.gate.read_bytes())["verdict"] == "passed"
    assert not is_refused(config, run)
