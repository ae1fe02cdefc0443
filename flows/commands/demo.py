"""demo: the whole pipeline on the tiny example, or the historical failure and how it is caught."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.command_output import add_output_flag, naming_report_of_failure, printer
from flows.commands.help_pages import Commands
from flows.commands.training import run_finetune_flow
from flows.process.environment import packaged_folder
from flows.terminal.console import print_line, print_progress, print_table
from flows.terminal.run_follower import LiveView, showing_run
from flows.terminal.run_results import print_tiers
from nested_core import seams
from nested_core.config.loading import load_config
from nested_core.config.schema import FineTuneConfig
from nested_core.storage.output_places import require_free_place
from nested_core.storage.run_directory import RunDirectory, new_run_name
from nested_core.text.loss_format import format_loss, loss_name_for_file

if TYPE_CHECKING:
    from nested_core.records.verdict import Verdict

ADAPTER_NAME = "geography"
# A model of hundreds of times as many parameters learns as much in a tenth of the examples.
SETTINGS_OF_LARGER_MODELS: dict[str, object] = {"batch_size": 4, "iters": 40, "learning_rate": 5e-4}


def add_commands(commands: Commands) -> None:
    """Add the command."""
    demo = commands.add("demo", run_demo, "Start")
    demo.add_argument(
        "--break-training",
        action="store_true",
        help="compute the updates and lose them, as the original trainer did",
    )
    demo.add_argument(
        "--model",
        metavar="MODEL",
        help="a folder or a hub name: tune it in place of the tiny one; minutes on a CPU",
    )
    add_output_flag(demo, "default: demo, or demo-broken", "--out", metavar="DIR")


def run_demo(arguments: argparse.Namespace) -> Callable[[], int]:
    """Run the whole pipeline on the tiny example."""
    from nested_core.registry.link_and_views import LINK_NAME

    out: Path = arguments.output or Path("demo-broken" if arguments.break_training else "demo")
    require_free_place(out, "--out")
    run = RunDirectory(out / "runs" / new_run_name())
    config = example_config(out / "registry", arguments.model)
    print_progress(
        f"Fine-tuning {config.model} on {config.data}, tiers {list(config.nested.frequencies)}."
    )
    if arguments.model is not None:
        print_progress(
            f"{config.iters} steps of {config.batch_size} rows, then 15 questions to the model "
            "before and after: some minutes on a laptop's CPU for a model of 0.1B parameters."
        )
    print_progress(f"run directory: {run.path}")
    breaking = _breaking_updates() if arguments.break_training else contextlib.nullcontext()
    with naming_report_of_failure(run), breaking, showing_run(run):
        # what a person needs to know of an error is said at the end
        settings = config.model_dump() | {"run_dir": str(run.path)}
        run_finetune_flow(settings, logging.CRITICAL).result()
    champion = out / "registry" / ADAPTER_NAME / LINK_NAME
    rows = _read_answers(config, run)
    from nested_core.records.verdict_file import read_verdict

    verdict = read_verdict(run.gate)

    def show() -> None:
        """Print how the run went, and the answers before and after."""
        _print_run(run, verdict)
        print_table(("question", "before", "after"), rows, title="Held-out countries")
        for suite in verdict.tasks:
            before, after = (round(s * suite.questions) for s in (suite.base, suite.candidate))
            total = suite.questions
            print_line(f"right answers: {before} of {total} before, {after} of {total} after")
        print_line(f"champion: {champion} -> {os.readlink(champion)}")
        if seams.is_there("chat"):
            print_line("talk to it:")
            print_line(f"  {_path_of_program('nested-tune')} chat {champion.parent}")
        print_line("talk to it by mlx-lm alone:")
        print_line(
            f"  {_path_of_program('mlx_lm.generate')} --model {config.model} "
            f'--adapter-path {champion} --prompt "{rows[0][0]}"'
        )
        print_line("look at it:")
        print_line(f"  {run.report}")

    return printer(show)


def _path_of_program(program: str) -> str:
    """How to call a program that came with us: by its path where the shell would not find it."""
    return program if shutil.which(program) else str(Path(sys.executable).with_name(program))


def example_config(registry: Path, model: str | None = None) -> FineTuneConfig:
    """The example's configuration, with its paths where it is installed.

    model: a larger one in place of the tiny base, with settings of its own.
    """
    folder = packaged_folder("examples")
    settings = {} if model is None else SETTINGS_OF_LARGER_MODELS
    paths = {"model": model or str(folder / "geography-base"), "data": str(folder / "geography")}
    target = {"path": str(registry), "name": ADAPTER_NAME, "promote": "better"}
    config = load_config(folder / "geography.yaml", settings | paths | {"registry": target})
    tasks = [t.model_copy(update={"file": str(folder.parent / t.file)}) for t in config.gate.tasks]
    gate = config.gate.model_copy(update={"tasks": tuple(tasks)})
    return config.model_copy(update={"gate": gate})


@contextlib.contextmanager
def _breaking_updates() -> Iterator[None]:
    """Have the trainer write updates as the original one did, which loses all of them.

    That was `'.'.join(path)` on a path that is one string already, so that no name matched. The
    product has no switch for this; the demonstration replaces the method of `Trainer`.
    """
    from mlx.utils import tree_map_with_path

    from nested_core.training.trainer import Trainer

    def lose_updates(self: Trainer, values: Mapping[str, object]) -> None:
        """Write no update, and raise no error."""
        parameters = self.model.trainable_parameters()
        changed = tree_map_with_path(lambda at, own: values.get(".".join(at), own), parameters)
        self.model.update(changed)

    print_progress("Training is broken on purpose: updates are computed and never reach the model.")
    working = Trainer.write_parameters_into_model
    Trainer.write_parameters_into_model = lose_updates  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.write_parameters_into_model = working  # type: ignore[method-assign]


def _read_answers(config: FineTuneConfig, run: RunDirectory) -> list[tuple[str, str, str]]:
    """What the gate asked, and what it was answered before and after training."""
    from nested_core.measure.answers.suites import read_suite
    from nested_core.records.answers import read_answers

    (task,) = config.gate.tasks
    prompts = [question.prompt for question in read_suite(Path(task.file), task.score)]
    questions = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
    records = read_answers(run.answers)
    before, after = (
        [record.answer.strip() for record in records if record.model == model]
        for model in ("base", "candidate")
    )
    return list(zip(questions, before, after, strict=True))


def _print_run(run: RunDirectory, verdict: Verdict) -> None:
    from nested_core.records.metrics import read_metrics

    for view in seams.load_all(LiveView):
        for line in view.draw_curve(read_metrics(run.metrics)).splitlines():
            print_line(line)
    print_tiers(verdict)
    losses = verdict.validation
    if losses is not None:
        print_line(
            f"gate: {verdict.describe()}; {loss_name_for_file(losses.file)} "
            f"{format_loss(losses.loss_before)} before, {format_loss(losses.loss_after)} after "
            f"({verdict.describe_data()})"
        )
