"""A trained run and the configuration that the gate judges it by, as they are or changed.

What `rewrite` changes is as a trainer with a fault would have left it: every digest agrees, so
that it is found by judging, not by hashing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import pytest

from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.errors import DamagedError, GateRejected
from nested_core.gate.evidence.run_evidence import digests_for_result
from nested_core.gate.judge import run_gate_checks
from nested_core.measure.losses.held_out_loss import (
    HeldOutExamples,
    LoadedBase,
    choose_held_out_examples,
    read_nonempty_splits,
)
from nested_core.models.parameters import reference_trainable_parameters
from nested_core.pipeline import steps
from nested_core.pipeline.publishing import confirm_recorded_verdict
from nested_core.records.verdict import Verdict
from nested_core.storage.adapter import WEIGHTS_NAME, read_adapter_config
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.checkpoint import publish_adapter, read_checkpoint, write_checkpoint
from nested_core.storage.checkpoint_verification import checkpoint_path
from nested_core.storage.manifest import describe_file, read_manifest
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays
from nested_core.training.evaluation import Evaluator
from tests.example import DATA, example_config, prepare, train
from tests.gate_files import read_gate, write_gate

Arrays = dict[str, mx.array]
STEPS = 8  # of the run that most tests judge


def example_data(folder: Path, *splits: str) -> Path:
    """A data set of these files of the example's, train and valid unless told."""
    folder.mkdir(parents=True)
    for split in splits or ("train", "valid"):
        shutil.copyfile(DATA / f"{split}.jsonl", folder / f"{split}.jsonl")
    return folder


def train_candidate(path: Path, config: FineTuneConfig | None = None, **changes: Any) -> Candidate:
    """Train a run of the example with these changes, or of another configuration."""
    config = example_config(**changes) if config is None else config
    return Candidate(config, train(config, prepare(config, path)).run)


def train_finished(folder: Path) -> Candidate:
    """The run of the fixture `finished`, with a data set of its own."""
    data = example_data(folder / "data")
    return train_candidate(folder / "run", iters=STEPS, data=str(data))


def nothing(value: Any) -> None:
    """Leave it as it is."""


def shifted(by: float) -> Callable[[Arrays], None]:
    """Every value of every tensor moved by so much."""
    return lambda tensors: tensors.update({name: value + by for name, value in tensors.items()})


def turned_around(tensors: Arrays) -> None:
    """What the adapter learned with its sign changed, thirty times: it becomes worse."""
    tensors.update({n: -30 * value for n, value in tensors.items() if n.endswith("lora_b")})


@dataclass(frozen=True)
class Candidate:
    """A run that the gate judges, and the configuration that it judges by."""

    config: FineTuneConfig
    run: RunDirectory

    def copy(self, path: Path) -> Self:
        """A copy that a test may spoil."""
        return replace(self, run=RunDirectory(Path(shutil.copytree(self.run.path, path))))

    def configured(self, **changes: Any) -> Self:
        """The same run by a configuration with these changes."""
        return replace(self, config=self.config.model_copy(update=changes))

    def bounded(self, **bounds: Any) -> Self:
        """The same run by other thresholds of the gate."""
        return self.configured(gate=GateSection.model_validate(bounds))

    def resumed(self, **bounds: Any) -> Self:
        """The same run by other bounds, begun again under them."""
        changed = self.bounded(**bounds)
        steps.write_run_config(changed.config, self.run, resume=True)
        return changed

    def judge(self) -> Verdict:
        """The verdict, written; GateRejected where it failed."""
        return steps.judge(self.config, self.run)

    def verdict(self) -> Verdict:
        """The verdict, whether it passed or failed, not written."""
        return run_gate_checks(self.config, self.run).verdict

    def confirm(self) -> None:
        """Hold the recorded verdict to the files, as `promote` does."""
        confirm_recorded_verdict(self.config, self.run)

    def reread(self) -> Self:
        """The same run by the configuration that its config.yaml now holds."""
        return replace(self, config=read_run_config(self.run))

    def require_damaged(self, pattern: str) -> None:
        """Expect that the recorded verdict is not believed, in one line that matches."""
        with pytest.raises(DamagedError, match=pattern) as caught:
            self.confirm()
        assert "\n" not in str(caught.value)

    def require_rejected(self, pattern: str) -> None:
        """Expect that the run does not pass the gate, with a message that matches."""
        with pytest.raises(GateRejected, match=pattern):
            self.judge()

    def held_out(self) -> HeldOutExamples:
        """The examples that it is judged on."""
        examples = choose_held_out_examples(read_nonempty_splits(self.config, self.run))
        assert examples is not None
        return examples

    @property
    def gate(self) -> dict[str, Any]:
        """The content of gate.json."""
        return read_gate(self.run.gate)

    def edit_gate(self, gate: Mapping[str, Any] | None = None, /, **values: Any) -> None:
        """Write gate.json with other values, and a manifest that agrees with it."""
        edited = {**(self.gate if gate is None else gate), **values}
        write_gate(self.run.path, edited, read_manifest(self.run.path)["files"])

    def bind_again(self) -> None:
        """Make a manifest that agrees with the files as they are now."""
        names = read_manifest(self.run.path)["files"].keys() - {self.run.gate.name}
        judged = {name: describe_file(self.run.path / name) for name in names}
        write_gate(self.run.path, self.gate, judged)

    @property
    def offered(self) -> Path:
        """The checkpoint that the adapter comes from."""
        step = json.loads(self.run.result.read_bytes())["adapter_step"]
        return checkpoint_path(self.run.checkpoints, step)

    @property
    def sides(self) -> tuple[Path, Path]:
        """The folders of the initial adapter and of the one that is selected."""
        return self.run.initial, self.run.adapter

    @property
    def initial(self) -> Arrays:
        """The tensors that training began from."""
        return load_arrays(self.run.initial / WEIGHTS_NAME)

    @property
    def trained(self) -> Arrays:
        """The tensors that are offered."""
        return load_arrays(self.run.adapter / WEIGHTS_NAME)

    def names(self, tier: int, leaf: str = "") -> list[str]:
        """The tensors of a tier."""
        owners = json.loads(self.run.tiers.read_bytes())["tensors"]
        return [name for name, owner in owners.items() if owner == tier and name.endswith(leaf)]

    def rewrite(
        self,
        *,
        change_state: Callable[[dict[str, Any]], object] = nothing,
        change_adapter: Callable[[Arrays], object] = nothing,
        change_moments: Callable[[Arrays], object] = nothing,
        change_config: Callable[[dict[str, Any]], object] = nothing,
        keeps_logits: bool = False,
    ) -> None:
        """Put a sound checkpoint that says something else in the offered one's place, and offer it.

        `keeps_logits`: the trainer's model was what it was, only the files came out otherwise.
        """
        run, path = self.run, self.offered
        state = dict(read_checkpoint(path).state)
        tensors = load_arrays(path / WEIGHTS_NAME)
        moments = load_arrays(path / "optimizer.safetensors")
        meaning = read_adapter_config(path / "adapter_config.json")
        change_adapter(tensors)
        change_moments(moments)
        change_config(meaning)
        if not keeps_logits and change_adapter is not nothing:
            state["logits"] = trainers_logits(self.config, state["logits"]["prompts"], tensors)
        change_state(state)
        write_checkpoint(
            run.checkpoints,
            adapter=tensors,
            adapter_config=meaning,
            optimizer_state=moments,
            state=state,
        )
        publish_adapter(path, run.adapter)
        vouch(run, path)

    def offer(self, tensors: Arrays, **options: Any) -> None:
        """Offer these tensors in place of the trained ones; the rest stays the trained one's."""
        self.rewrite(change_adapter=lambda own: own.update(tensors), **options)


def trainers_logits(
    config: FineTuneConfig, prompts: list[list[int]], tensors: Arrays
) -> dict[str, Any]:
    """What a trainer would have recorded that had these tensors in its model."""
    model = LoadedBase.load(config).model
    refs = reference_trainable_parameters(model)
    fitting = {name: value for name, value in tensors.items() if name in refs}
    evaluator = Evaluator(model, refs, prompts=prompts)
    logits: dict[str, Any] = finite_or_none(evaluator.logits_on_fixed_prompts(fitting))
    return logits


def vouch(run: RunDirectory, offered: Path) -> None:
    """Let result.json hold the digests of what now stands in the folder, as training does."""
    result = json.loads(run.result.read_bytes())
    result["evidence"] = digests_for_result(run, offered)
    run.result.write_text(json.dumps(result))
