"""The steps of a fine-tune, each from disk to disk: validate, load, train, judge.

A step reads what it needs of the one before from the run directory. `pipeline.finetune` calls them
in turn; a Prefect flow calls each as a task. A step that computes with the model locks the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core import seams
from nested_core.backend import warn_if_unprepared
from nested_core.config.loading import render_config
from nested_core.config.resume import read_run_config, refuse_differences_on_resume
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.data.data_settings import REPLAY_SPLIT, DataSettings
from nested_core.data.dataset_loading import load_run_data
from nested_core.data.earlier_examples import find_earlier_examples
from nested_core.data.example_digests import TrainedRows
from nested_core.data.held_out_rows import read_group_values
from nested_core.data.parallel_jobs import OnProgress
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import (
    JUDGE_AGAIN,
    ConfigError,
    DamagedError,
    DatasetError,
    GateRejected,
    NestedTuneError,
    shorten,
)
from nested_core.gate.checks.judged import CheckedRun
from nested_core.gate.evidence.run_evidence import digests_for_result
from nested_core.gate.judge import run_gate_checks
from nested_core.gate.proof.fresh_process_check import start_proof_process
from nested_core.gate.recheck import from_evidence, task_file_entries
from nested_core.measure.answers.questions_in_training import QuestionsInTraining
from nested_core.measure.answers.suite_answers import (
    encode_suites,
    read_suites,
    record_or_compare_suites,
)
from nested_core.measure.losses.held_out_loss import (
    HeldOutExamples,
    LoadedBase,
    read_held_out_examples,
    read_held_out_file,
    read_nonempty_splits,
    require_validated_data,
)
from nested_core.measure.losses.left_out_examples import (
    find_trained_rows,
    read_run_rows,
    write_exported_rows,
)
from nested_core.measure.losses.loss_on_test_set import LossOnTestSet
from nested_core.models.adapter_fit import require_fit
from nested_core.models.base_model import (
    TrainedTokenizer,
    describe_token_beyond,
    find_model_folder,
    fingerprint_base_model,
    model_compute_dtype,
    vocabulary_size,
)
from nested_core.models.generation import encode_prompt
from nested_core.models.lora_attachment import (
    load_adapter_tensors,
    make_adapter_config,
    read_adapter_file,
)
from nested_core.models.parameters import trainable_parameters
from nested_core.models.session import (
    BaseWithAdapter,
    Session,
    frozen_tensors,
    load_base_with_adapter,
)
from nested_core.models.tokenizer_cell import end_kept_cell, start_kept_cell
from nested_core.optim.tier_assignment import TierMap, assign_tiers
from nested_core.optim.tiers_file import write_tiers
from nested_core.pipeline.continual import starting_champion
from nested_core.pipeline.device_lock import OnWait, locking_devices
from nested_core.pipeline.named_models import find_rows_of_base
from nested_core.pipeline.preflight import StartRules
from nested_core.pipeline.processes import Processes, count_processes, load_services
from nested_core.process.command_parent import list_earlier_ends
from nested_core.records.answers import write_answers
from nested_core.records.dataset import (
    DatasetReport,
    PromptFormat,
    read_dataset_record,
    require_held_out,
    require_test_set,
)
from nested_core.records.judged_run import JudgedRun
from nested_core.records.plan import (
    TrainingPlan,
    list_rank_counts,
    list_resumptions,
    read_plan,
    write_plan,
)
from nested_core.records.promoted_to import add_promoted_to
from nested_core.records.result import TrainResult, read_result, write_result
from nested_core.records.start import CONFIGURED, START_FILE, Start
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import write_verdict
from nested_core.registry.versions import PROVENANCE_NAME
from nested_core.storage.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    export_adapter,
    write_adapter,
)
from nested_core.storage.atomic import (
    new_directory,
    remove_file,
    remove_leftovers,
    write_bytes,
    write_json,
)
from nested_core.storage.checkpoint import latest_checkpoint, publish_adapter
from nested_core.storage.checkpoint_verification import checkpoint_path, latest_state
from nested_core.storage.manifest import describe_content, describe_file
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays
from nested_core.text.stages import stages
from nested_core.training.parameter_importance import measure_parameter_importance
from nested_core.training.reports.training_callback import TrainingCallback
from nested_core.training.trainer import Trainer, make_trainer
from nested_core.training.training_setup import build_optimizer, prepare_training
from nested_core.training.world import SINGLE_PROCESS_WORLD, World


def write_run_config(config: FineTuneConfig, run: RunDirectory, *, resume: bool) -> None:
    """Write the resolved configuration; on resume, refuse one that differs in a key that matters.

    A run without an initial adapter accepts any configuration. Call it once, under the run's lock:
    if a configuration exists then without `resume`, another process wrote it. Raises ConfigError.
    """
    suites = read_suites(config.gate)  # a bad line is said before hours of training, not after
    remove_leftovers(run.path)
    remove_leftovers(run.checkpoints)
    if run.config.exists():
        if not resume:
            raise ConfigError(
                f"{run.path}: another process has begun a run here meanwhile. A run is never "
                f"written over: give a --run-dir of its own."
            )
        if run.tiers.exists():
            began_with = read_run_config(run)
            refuse_differences_on_resume(began_with, config, run.path)
            _refuse_fewer_iterations(began_with, config, run)
            left = began_with.registry.location
            # Its champion may be this adapter, also after the verdict is removed to train on
            if left and left != config.registry.location and run.adapter.exists():
                add_promoted_to(run.promoted_to, *left)
    record_or_compare_suites(run, suites)
    write_bytes(run.config, render_config(config))


def _refuse_fewer_iterations(
    began_with: FineTuneConfig, config: FineTuneConfig, run: RunDirectory
) -> None:
    """Raise ConfigError if `iters` is lowered below what the newest checkpoint has done already.

    Epochs cannot differ on resume, and `training.minutes` counts anew.
    """
    done = latest_state(run.checkpoints).get("iteration", 0)
    is_counted = config.training.epochs is None and config.training.minutes is None
    if is_counted and config.iters < min(done, began_with.iters):
        raise ConfigError(
            f"{run.path} cannot be resumed with iters: {config.iters:,}, since its newest "
            f"checkpoint has {done:,} already. Give as many or more, or another --run-dir."
        )


def validate(
    config: FineTuneConfig, run: RunDirectory, on_progress: OnProgress | None = None
) -> DatasetReport:
    """Validate the data set, write dataset.json and return the report.

    The earlier examples that the run replays are chosen too. Raises DatasetError if the data has an
    error or changes meanwhile, ConfigError for missing earlier data under `replay.missing: error`.
    """
    chosen_for = choose_earlier_examples(config, run)
    report, _ = load_run_data(config, run, on_progress)
    for split, digest in chosen_for.items():
        if split in report.splits and report.splits[split].digest != digest:
            raise DatasetError(
                f"{config.data}: {report.splits[split].file} changed while it was read. Run it "
                f"again when nobody writes to it."
            )
    write_json(run.dataset, report.to_json())
    report.raise_if_rejected()
    require_askable_suites(config, report.prompt_format)
    require_held_out_examples(config, run)
    return report


def choose_earlier_examples(config: FineTuneConfig, run: RunDirectory) -> Mapping[str, str]:
    """Choose the examples of earlier versions that the run trains on, unless that was done before.

    Returns the digests of the splits that they were chosen for; none without a choice. Raises
    ConfigError for missing earlier data under `replay.missing: error`.
    """
    if run.initial.exists() and run.tiers.exists():
        return {}
    for written in (run.replay, run.replayed_rows, run.start):
        remove_file(written)
    earlier = find_earlier_examples(config, run)
    return {} if earlier is None else earlier.choose()


def describe_earlier_examples(config: FineTuneConfig, run: RunDirectory) -> list[str]:
    """Return sentences on the earlier examples that a validated run trains on; may be empty."""
    earlier = find_earlier_examples(config, run)
    return [] if earlier is None else earlier.describe()


def require_askable_suites(config: FineTuneConfig, prompt_format: PromptFormat | None) -> None:
    """Check that the model can be asked the questions of `gate.tasks` and `samples`.

    prompt_format: of the training rows, as which a question's `prompt` is asked.

    Raises ConfigError if a file is missing or a prompt of `samples` has a token that the model does
    not know, DatasetError for bad lines or prompts that the model cannot take.
    """
    if not config.gate.tasks and not config.samples:
        return
    tokenizer = TokenizerSource.from_config(config).load()
    base = find_model_folder(config.model)
    encode_suites(read_suites(config.gate), tokenizer, base, prompt_format)
    rows = vocabulary_size(base)
    for sample in config.samples:
        tokens = encode_prompt(tokenizer, sample, prompt_format)
        if problem := describe_token_beyond(tokenizer, tokens, rows):
            raise ConfigError(f"samples: {shorten(sample)!r}: {problem}.")


def require_held_out_examples(config: FineTuneConfig, run: RunDirectory) -> None:
    """Check before training that the examples for `gate.held_out` and `test` exist.

    Raises ConfigError if the split or the file is missing, DatasetError if the file has an error or
    there is no test set.
    """
    dataset = read_dataset_record(run.dataset)
    if config.test:
        require_test_set(dataset, config.data)
    gate = config.gate
    if gate.held_out not in SPLITS_BY_HELD_OUT_CHOICE:
        read_held_out_file(config)
    require_held_out(gate.held_out, gate.max_kl, dataset, config.data)
    if config.data_policy.group is not None:
        splits = read_nonempty_splits(config, run)
        _warn_of_shared_groups(config, splits["train"], read_held_out_examples(config, splits))


def _warn_of_shared_groups(
    config: FineTuneConfig, train: TokenizedSplit, held_out: HeldOutExamples | None
) -> None:
    """Warn if rows of train have the `data_policy.group` of held-out rows, and may answer them."""
    groups = [] if held_out is None else [one for one in held_out.groups or () if one is not None]
    settings, lines = DataSettings.from_config(config), train.lines.tolist()
    with suppress(DatasetError):  # no row of train has such a field
        trained = set(read_group_values(settings, "train", lines)) if groups else ()
        if shared := sum(one in trained for one in groups):
            warnings.warn(
                f"{shared:,} of {len(groups):,} held-out rows share their {settings.policy.group} "
                f"with rows of train, which may answer them: put each into one split.",
                stacklevel=2,
            )


def write_initial_adapter_and_tiers(
    config: FineTuneConfig,
    run: RunDirectory,
    on_wait: OnWait | None = None,
    *,
    session: Session | None = None,
) -> None:
    """Write the initial adapter and the tier of each tensor, unless they exist.

    The adapter is fresh, from resume_adapter_file, or the champion if `continual` says so, which is
    recorded in start.json. The device is locked meanwhile; `on_wait` is called with a line if
    another process holds it.
    """
    if run.initial.exists() and run.tiers.exists():
        return
    session = session or Session()
    with locking_devices(on_wait, session=session):
        write_initial_adapter(config, run, session)


def write_initial_adapter(config: FineTuneConfig, run: RunDirectory, session: Session) -> None:
    """Write the initial adapter, start.json and tiers.json; the caller holds the device's lock.

    The initial adapter has the tensors of, in this order: `resume_adapter_file`; the champion, if
    `continual.from` asks for it and the earlier examples were not chosen to be trained on from
    scratch; else fresh ones. start.json records the champion and that choice.

    Raises ConfigError if the starting adapter does not fit the configuration or the base model.
    """
    loaded = _load_base_for_initial_adapter(config, session)
    model, base = loaded.model, loaded.folder
    described = make_adapter_config(config, fingerprint_base_model(base))  # adapter_config.json
    champion = starting_champion(config)
    version = None if champion is None else champion.digest()
    choice = CONFIGURED
    if earlier := find_earlier_examples(config, run):
        earlier.require_same_start(version)
        choice = earlier.read_choice()
    continues = champion is not None and choice.policy == "continue"
    start, source = None, f"continual.from: the champion of {config.registry.name}"
    if continues:
        for rules in seams.load_all(StartRules):
            rules.require_usable_rate(config)
        start = champion
    if config.resume_adapter_file is not None:
        start = read_adapter_file(Path(config.resume_adapter_file))
        source = f"resume_adapter_file: {start.path}"
    if start is not None:
        _warn_of_other_tokenizer(start, source, base)
        require_fit(start, source, described, base, trainable_parameters(model))
        load_adapter_tensors(model, start.to_mlx())
        if not start.config:
            warnings.warn(
                f"{source} has no {CONFIG_NAME} beside it: the scale and the base that it was "
                f"trained with are not known. It is used with scale "
                f"{config.lora_parameters.scale:g} on {base}.",
                stacklevel=2,
            )
    if config.continual.start is not None:
        rate_share = config.continual.rate if continues else 1.0
        START_FILE.write(run.start, Start(version, choice, rate_share))
    with new_directory(run.initial, replace=True) as folder:
        write_adapter(folder, trainable_parameters(model), described)
    _record_training_rows(config, run, start, base)
    tiers = _assign_tiers(config, run, model)
    build_optimizer(config, tiers, steps=1)  # refuses unusable arguments before training begins
    write_tiers(run.tiers, tiers)


def _warn_of_other_tokenizer(start: Adapter, source: str, base: Path) -> None:
    """Warn if a version was trained with another chat template or vocabulary than the base has."""
    try:
        TrainedTokenizer.read(start.path / PROVENANCE_NAME).require_in(base, source)
    except ConfigError as problem:
        warnings.warn(f"{problem} The run goes on from there.", stacklevel=2)


def _record_training_rows(
    config: FineTuneConfig, run: RunDirectory, start: Adapter | None, base: Path
) -> None:
    """Write which rows the run trains on, and which its base and its initial adapter learnt.

    start: the adapter that the run goes on from, wherever it is; None for a fresh one.
    """
    _, splits = load_run_data(config, run)
    rows = find_rows_of_base(base)
    for split in (splits[name] for name in ("train", REPLAY_SPLIT) if name in splits):
        rows |= TrainedRows(np.concatenate([split.contents, split.beginnings]))
    if start is not None:
        location = config.registry.location
        rows |= find_trained_rows(start, None if location is None else location[0])
    if rows.unknown is not None:
        stages.info("what the run goes on from was trained on rows that are not known:")
        stages.info("%s", rows.unknown)
    write_json(run.training_examples, rows.to_json())


def _load_base_for_initial_adapter(config: FineTuneConfig, session: Session) -> BaseWithAdapter:
    """Load the base model, in training precision if that does not affect the initial adapter.

    Fresh LoRA factors do not depend on the base's values. DoRA's magnitudes, weights under `full`
    and measured importances do, and are computed from the base as it is stored.
    """
    is_as_stored = model_compute_dtype(config) is None
    depends = config.nested.strategy == "parameter_importance" or config.fine_tune_type != "lora"
    if count_processes(config) > 1 or (depends and not is_as_stored):
        return load_base_with_adapter(config, as_stored=True)
    return session.load_base(config)


def _assign_tiers(config: FineTuneConfig, run: RunDirectory, model: Any) -> TierMap:
    """Assign each trainable tensor to a tier, measuring importances if the strategy needs them."""
    importance = None
    if config.nested.strategy == "parameter_importance":
        _, splits = load_run_data(config, run)
        importance = measure_parameter_importance(config, model, splits["train"])
    return assign_tiers(trainable_parameters(model), config.nested, importance)


def train(
    config: FineTuneConfig,
    run: RunDirectory,
    callback: TrainingCallback | None = None,
    on_start: Callable[[Any], None] | None = None,
    on_wait: OnWait | None = None,
    *,
    session: Session | None = None,
) -> TrainResult:
    """Train from the initial adapter, or from the last sound checkpoint, to the end.

    on_start: called with the trainer before its first step, so that a signal can stop it; with
        several processes, with an object that has a trainer's methods for all of them.
    on_wait: called with a line if another process holds a device, which is locked meanwhile.

    A run that is already complete is not trained again. Raises what a trainer raises.
    """
    warn_if_unprepared()  # of a process in which training would be slow
    if run.result.exists() and _is_complete(config, run):
        try:
            result = read_result(run.result)
        except DamagedError as error:  # the checkpoints are sound: it is written again from them
            warnings.warn(f"{error} It is made again from the checkpoints.", stacklevel=2)
        else:
            stages.info("%s is trained already: nothing is trained, the gate runs again", run.path)
            return result
    processes = count_processes(config)
    services = load_services(config)
    reporting = nullcontext(callback) if services is None else services.reporting(run, callback)
    with locking_devices(on_wait, processes, session), reporting as callbacks:
        if processes == 1:
            trainer = train_model(config, run, callbacks, on_start, session=session)
            return _publish_result(run, trainer)
        ranks = seams.load_only(Processes, "training.processes")
        ranks.train(config, run, processes, callbacks, on_start)
        return read_result(run.result)


def train_as_rank(
    config: FineTuneConfig,
    run: RunDirectory,
    world: World,
    callback: TrainingCallback,
    on_start: Callable[[Trainer], None],
) -> None:
    """Train in one of several data-parallel processes; the main one writes the result."""
    trainer = train_model(config, run, callback, on_start, world=world)
    if world.is_main:
        _publish_result(run, trainer)


def train_model(
    config: FineTuneConfig,
    run: RunDirectory,
    callback: TrainingCallback | None,
    on_start: Callable[[Any], None] | None,
    *,
    session: Session | None = None,
    world: World = SINGLE_PROCESS_WORLD,
) -> Trainer:
    """Train in this process, which holds the device's lock; return the trainer after its last step.

    A run that was interrupted is resumed from its last checkpoint. The main process also removes
    the results of an earlier end of the run, and writes the plan that progress displays read.

    callback: receives reports. on_start: called with the trainer before its first step.
    session: what this process keeps loaded between the steps of a run.
    world: the processes that train together.
    """
    base = (session or Session()).load_base(config)
    model = base.model
    report, splits = load_run_data(config, run)
    require_validated_data(run, report)
    load_adapter_tensors(model, load_arrays(run.initial / WEIGHTS_NAME))
    how: dict[str, Any] = {"base": base.folder, "prompt_format": report.prompt_format}
    encode = partial(encode_suites, tokenizer=base.tokenizer, **how)
    setup = prepare_training(
        config,
        run,
        model,
        splits,
        tokenizer=base.tokenizer,
        callback=callback,
        make_questions=partial(QuestionsInTraining.from_config, config, base.tokenizer, encode),
        world=world,
    )
    if config.training.evaluate_tasks and not setup.step_schedule.validation_examples:
        raise ConfigError(
            "training.evaluate_tasks: questions are asked at evaluations, and there are none. Give "
            "a valid split (`nested-tune init --split`) and val_batches above 0 or -1."
        )
    trainer = make_trainer(setup)
    if world.is_main:
        stages.info("%s", trainer.describe_layers())
    if session is not None:  # the gate's process starts while the last steps are computed
        trainer.on_near_end = partial(_start_proof_process, config, trainer, base, session)
        trainer.after_step = session.after_step
    trainer.resume()
    if world.is_main:
        run.require_lock()
        # The run is made longer: what it ended with is out of date.
        for earlier in (run.report, run.manifest, run.gate, *run.measured, run.result):
            remove_file(earlier)
        plan = _make_plan(trainer, report, read_plan(run.plan), session)
        write_plan(run.plan, plan)
        if sentence := plan.describe_rank_counts():
            stages.info("%s", sentence)
    if on_start is not None:
        on_start(trainer)
    # Kernels are compiled in the background; the wait for them ends at a request to stop.
    if session is not None and session.await_kernels is not None:
        session.await_kernels(lambda: trainer.stop_requested or run.stop_request.exists())
    end_kept_cell()  # for hours: it holds a tokenizer
    trainer.train()
    base.evaluation_peak = trainer.evaluation_peak
    base.training_peak = mx.get_peak_memory()
    return trainer


def _start_proof_process(
    config: FineTuneConfig, trainer: Trainer, base: BaseWithAdapter, session: Session
) -> None:
    """Start the gate's processes; one also loads its base if the device has ample memory.

    That is room for the base beside twice what training is forecast to need.
    """
    needed, trusts = trainer.memory.needed, config.trust_remote_code
    size = sum(array.nbytes for array in frozen_tensors(base.model).values())
    is_ample = needed is not None and 2 * needed + size <= trainer.memory.capacity
    folder = base.folder if is_ample else None
    session.keep_proof_process(partial(start_proof_process, folder, trusts_remote_code=trusts))
    start_kept_cell()


def _make_plan(
    trainer: Trainer, report: DatasetReport, earlier: TrainingPlan | None, session: Session | None
) -> TrainingPlan:
    """Build the plan of the process that trains now: what progress displays and reports read.

    report: of the validated data.
    earlier: the plan of the process before it; None in a new run.
    """
    schedule = trainer.step_schedule
    has_validation = schedule.validation_examples > 0
    needed = trainer.memory.needed
    return TrainingPlan(
        steps=schedule.steps,
        iterations=schedule.iterations,
        epochs=schedule.epochs,
        first_step=trainer.current_step,
        frequencies=tuple(tier.frequency for tier in trainer.tier_stats()),
        offers_best=schedule.offers_best and has_validation,
        training_file=report.splits["train"].file,
        validation_file=report.splits["valid"].file if has_validation else None,
        validation_examples=schedule.validation_examples,
        memory_forecast_gb=None if needed is None else needed / 1e9,
        memory_limit_gb=trainer.memory.capacity / 1e9,
        resumed_at=list_resumptions(earlier, trainer.current_step),
        rank_counts=list_rank_counts(earlier, trainer.current_step, trainer.world.size),
        select_by=trainer.config.training.select_by,
        ended_by=list_earlier_ends() or (() if earlier is None else earlier.ended_by),
        time=None if session is None else session.time_plan,
    )


def _is_complete(config: FineTuneConfig, run: RunDirectory) -> bool:
    """Return whether training ended with the number of iterations that the configuration has now.

    The newest checkpoint is verified only if it says so, since resuming verifies it anyway.
    """

    plan = read_plan(run.plan)
    minutes = None if plan is None or plan.time is None else plan.time.minutes

    def has_all_iterations(state: Mapping[str, object]) -> bool:
        """Return whether a checkpoint's state is the end of a run of the configured length."""
        if state.get("ended") == "time" and minutes != config.training.minutes:
            return False
        return bool(state.get("ended")) and state.get("wanted_iterations") == config.iters

    if not has_all_iterations(latest_state(run.checkpoints)):
        return False
    checkpoint = latest_checkpoint(run.checkpoints)
    return checkpoint is not None and has_all_iterations(checkpoint.state)


def _publish_result(run: RunDirectory, trainer: Trainer) -> TrainResult:
    """Publish the best adapter, or the last one if that is offered; write result.json.

    To publish is to copy the adapter from its checkpoint to the run's folder `adapter`, and to
    `adapter_path` if that is configured. The best is the one with the best evaluation.
    """
    state = trainer.state
    best = state.best_step if trainer.step_schedule.offers_best else None
    step = state.step if best is None else best
    offered = checkpoint_path(run.checkpoints, step)
    publish_adapter(offered, run.adapter, confirm=run.require_lock)
    if trainer.config.adapter_path is not None:
        folder = export_adapter(run.adapter, trainer.config.adapter_path, run.path)
        write_exported_rows(folder, read_run_rows(run))
    result = TrainResult(
        run_dir=str(run.path),
        step=state.step,
        adapter_step=step,
        train_loss=state.train_loss,
        val_loss=state.val_loss,
        best_val_loss=state.best_val_loss,
        verified_steps=len(state.verified_steps),
        red_flags=tuple(state.red_flags),
        ended=state.ended or "",
        evidence=digests_for_result(run, offered),
    )
    write_result(run.result, result, confirm=run.require_lock)
    return result


def judge(
    config: FineTuneConfig,
    run: RunDirectory,
    on_wait: OnWait | None = None,
    *,
    session: Session | None = None,
) -> Verdict:
    """Judge the run's adapter and write gate.json; GateRejected if it did not pass.

    The device is locked meanwhile. If the machine fails (memory, disk, compiler), NestedTuneError
    is raised and no verdict is written: that is not the adapter's fault.

    session: what this process keeps loaded; it gets what the registration needs of the run.
    """
    session = session or Session()
    helping: AbstractContextManager[None] = nullcontext()
    processes = config.training.processes
    if processes > 1:
        helping = seams.load_only(Processes, "training.processes").helping(config, session)
    with locking_devices(on_wait, processes, session), helping:
        try:
            checked = run_gate_checks(config, run, session)
        except (MemoryError, RuntimeError) as error:  # MLX's own, for memory, files and compilers
            raise NestedTuneError(
                f"The gate could not compute with {run.adapter}, and gives no verdict: {error}. "
                f"Look for memory, room in the temporary folder and the C++ compiler.",
                advice=JUDGE_AGAIN,
            ) from error
    run.require_lock()
    session.judged = _write_verdict(checked)
    verdict = checked.verdict
    if not verdict.has_passed:
        raise GateRejected(
            f"The gate rejected {run.adapter}: {verdict.summary()}. Nothing was registered; the "
            f"evidence is in {run.gate}.",
            run=run,
            verdict=verdict,
        )
    return verdict


def _write_verdict(checked: CheckedRun) -> JudgedRun:
    """Write the gate's measurements, then gate.json and the manifest that binds it to them."""
    config, run = checked.config, checked.run
    remove_file(run.manifest)  # no verdict is bound to files that are written anew
    for earlier in run.measured:
        remove_file(earlier)
    config_entry = describe_content(render_config(config))  # as it would be written now
    entries = checked.evidence.files | {run.config.name: config_entry}
    for name, content in checked.written_files.items():
        write_bytes(run.path / name, content)
        entries[name] = describe_file(run.path / name)
    if checked.answers:
        write_answers(run.answers, checked.answers)
        entries |= task_file_entries(config.gate, run)
    return from_evidence(run, write_verdict(run.path, checked.verdict, entries), checked.evidence)


def measure_test(
    config: FineTuneConfig,
    run: RunDirectory,
    on_wait: OnWait | None = None,
    *,
    session: Session | None = None,
) -> LossOnTestSet:
    """Measure the mean loss of the run's adapter on `test_batches` batches of test.jsonl.

    Examples that the run or an ancestor was trained on are left out, as in the gate. Raises
    DatasetError if there is no test set.
    """
    session = session or Session()
    dataset = read_dataset_record(run.dataset)
    require_test_set(dataset, config.data)
    with locking_devices(on_wait, session=session):
        split = read_nonempty_splits(config, run)["test"]
        base = LoadedBase.load(config, session)
        [(sums, tokens)] = base.example_loss_sums((run.adapter,), split, config.test_batches)
    is_seen = read_run_rows(run).find_in(split.contents)
    counted = tokens[~is_seen].sum()
    limit = f"at most {config.test_batches} batches of {config.batch_size}"
    return LossOnTestSet(
        mean=float(sums[~is_seen].sum() / counted) if counted else None,
        left_out=int((tokens[is_seen] > 0).sum()),
        file=dataset.splits["test"].file,
        examples="all examples" if config.test_batches < 0 else limit,
        adapter_step=read_result(run.result).adapter_step,
    )
