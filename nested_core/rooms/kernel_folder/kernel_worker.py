"""Compiles the kernels of one part of a run, in a process of its own (`first_kernels`).

A request names the part and a run directory that is thrown away, with configuration and
dataset.json. It computes as the run will, on a base whose layers share their weights, so that it
needs little memory. Nothing that it computes is used: the kernels that MLX compiled for it are,
which are recorded when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nested_core import backend
from nested_core.errors import TrainingStopped

if TYPE_CHECKING:
    from nested_core.config.schema import FineTuneConfig
    from nested_core.models.session import Session
    from nested_core.optim.gradients import Flat
    from nested_core.storage.run_directory import RunDirectory
    from nested_core.training.train_step import TrainStep
    from nested_core.training.trainer import Trainer

TOKENS_OF_ANSWER = 4


def answer(request: dict[str, str]) -> None:
    """Prepare this process, and compute the part; the errors are those of the run itself."""
    backend.prepare()
    backend.hide_torch_from_transformers()
    compute_part(request["part"], Path(request["folder"]))


def compute_part(part: str, folder: Path) -> None:
    """Compute a part of the run of a folder."""
    from nested_core.config.resume import read_run_config
    from nested_core.models.session import Session
    from nested_core.pipeline import steps
    from nested_core.storage.run_directory import RunDirectory

    run = RunDirectory(folder)
    config = read_run_config(run)
    with run.locked(), Session() as session:
        session.load_base(config, shares_layers=True)
        steps.write_initial_adapter(config, run, session)
        PART_FUNCTIONS[part](config, run, session)


class _NoStep:
    """Has a trainer compute something of the caller's, or the first evaluation, and no step."""

    def __init__(self, compute: Callable[[Trainer], None] | None = None) -> None:
        """`compute` is called with the trainer, before the first evaluation, and is all then."""
        self._compute = compute
        self._trainer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Compute what was asked before the first evaluation."""
        self._trainer = trainer
        if self._compute is not None:
            with trainer.using_training_layers():
                self._compute(trainer)
        if self._compute is not None or not trainer.step_schedule.validation_examples:
            raise TrainingStopped("All that is needed was computed.")

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Do nothing: a report comes after a step, and there is none."""

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Stop before the first step."""
        self._trainer.stop_training()


def _train(
    config: FineTuneConfig,
    run: RunDirectory,
    session: Session,
    compute: Callable[[Trainer], None] | None = None,
) -> None:
    from nested_core.pipeline import steps

    part = _NoStep(compute)
    with suppress(TrainingStopped):
        steps.train_model(config, run, part, part.on_start, session=session)


def compute_gradients(trainer: Trainer) -> None:
    """Forward and backward pass over one batch, for each set of tiers that are due together."""
    import mlx.core as mx

    from nested_core.models.parameters import restoring_parameters

    step = trainer.make_train_step()
    arrays = step.loss_fn.prepare_batch(trainer.step_schedule.micro_batch(0))
    for due in _sets_of_due_tiers(trainer, step):
        compute = mx.compile(step.forward_backward, inputs=step.captured, outputs=step.captured)
        with restoring_parameters(step.parameters):
            mx.eval(compute(step.packed.parameters, _due_parameters(step, due), *arrays))


def compute_updates(trainer: Trainer) -> None:
    """Make the optimizer's step with gradients of zero, for each set of tiers due together."""
    import mlx.core as mx

    step = trainer.make_train_step()
    weight = mx.array(1)
    for due in _sets_of_due_tiers(trainer, step):
        parameters = _due_parameters(step, due)
        packing = step.packed.packing
        names = {key: next(iter(packing.arrays[key].shapes)) for key in parameters}
        gradients = {
            key: mx.zeros(array.shape, step.parameters[names[key]].dtype)  # as they are computed
            for key, array in parameters.items()
        }

        def update(gradients: Flat, weight: mx.array, parameters: Flat) -> Flat:
            """Update as a step does once it has gradients, in the parameters' dtype."""
            cast = {key: g.astype(parameters[key].dtype) for key, g in gradients.items()}
            return step.update(cast, weight, parameters)

        compute = mx.compile(update, inputs=step.captured, outputs=step.captured)
        mx.eval(compute(gradients, weight, parameters), step.packed.optimizer.state)


def _sets_of_due_tiers(trainer: Trainer, step: TrainStep) -> Iterable[tuple[int, ...]]:
    """Return the tiers that are due at some step, each set of them once."""
    slowest = max(trainer.setup.tiers.frequencies)
    return {step.needed_tiers(number): None for number in range(1, slowest + 1)}


def _due_parameters(step: TrainStep, due: tuple[int, ...]) -> Flat:
    keys = step.packed.packing.keys_of_tiers(due)
    return {key: value for key, value in step.packed.parameters.items() if key in keys}


def compute_answers(config: FineTuneConfig, run: RunDirectory, session: Session) -> None:
    """Compute the gate's losses, and answers of the base as the gate and plain mlx_lm do."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    from nested_core.data.dataset_loading import load_run_data
    from nested_core.measure.losses.held_out_loss import LoadedBase
    from nested_core.models.base_model import share_layers
    from nested_core.models.generation import Sampling, answer_prompts
    from nested_core.storage.adapter import WEIGHTS_NAME
    from nested_core.storage.safetensors_files import load_arrays
    from nested_core.training.evaluation import choose_prompts

    _, splits = load_run_data(config)
    prompts = choose_prompts(splits)
    base = LoadedBase.load(config, session)
    adapter = load_arrays(run.initial / WEIGHTS_NAME)
    split = splits["valid"] if len(splits.get("valid", ())) else splits["train"]
    base.compare_predictions([adapter, adapter], split, max_batches=1)
    answer_prompts(base.model, base.tokenizer, prompts, Sampling(TOKENS_OF_ANSWER))

    plain = load(  # as the fresh process of the gate loads it
        str(base.folder),
        tokenizer_config={"trust_remote_code": config.trust_remote_code},
        trust_remote_code=config.trust_remote_code,
        adapter_path=str(run.initial),
        lazy=True,
    )[0]
    share_layers(plain)
    for prompt in prompts[:1]:
        logits = plain(mx.array([list(prompt)]))[0, -1].astype(mx.float32)
        mx.eval(logits[mx.array(list(range(0, logits.size, max(1, logits.size // 256))))])
        list(generate_step(mx.array(list(prompt)), plain, max_tokens=TOKENS_OF_ANSWER))


PART_FUNCTIONS: dict[str, Callable[[FineTuneConfig, RunDirectory, Session], None]] = {
    "evaluation": _train,
    "gradients": partial(_train, compute=compute_gradients),
    "updates": partial(_train, compute=compute_updates),
    "answers": compute_answers,
}
