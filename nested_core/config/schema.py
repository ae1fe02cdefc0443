"""The configuration of a fine-tune: the keys of `mlx_lm.lora`, and our own in sections.

Unknown keys are refused with the nearest known one; every problem is reported, not just the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    ValidationError,
)

from nested_core import seams
from nested_core.config.error_messages import explain_problems, find_problems
from nested_core.config.section_base import Section, key, lay_out_form
from nested_core.config.sections import (
    ContinualSection,
    DataFormat,
    DataPolicy,
    GateSection,
    HubDatasets,
    LoraParameters,
    Names,
    NestedSection,
    NumberOrShare,
    RegistrySection,
    SaveInterval,
    TrainingSection,
    name_optimizer,
    optimizer_problems,
    parse_optimizer_name,
)
from nested_core.errors import ConfigError

CountOrAll = Annotated[int, Field(ge=-1)]  # -1 is all
SamplePrompt = Annotated[str, StringConstraints(min_length=1, max_length=10_000)]
Optimizer = Annotated[str, BeforeValidator(name_optimizer), AfterValidator(parse_optimizer_name)]


Interval = Annotated[NumberOrShare, Field(gt=0)]

DEFAULT_REPLAY = 0.5  # of 0.1, 0.3 and 0.5 the best: benchmarks/learning/RESULTS-3.md


@dataclass(frozen=True)
class Intervals:
    """Iterations between two reports, evaluations and checkpoints of a run; each is at least 1.

    save: None if checkpoints are `save_seconds` apart instead.
    """

    report: int
    evaluation: int
    save: int | None
    save_seconds: float | None = None

    def due(self, first: int, last: int) -> Due:
        """Return what is due after the iterations `first` + 1 to `last`.

        A report, an evaluation or a checkpoint is due if one of these iterations is a multiple of
        its interval.
        """
        return Due(
            *(
                every is not None and last // every > first // every
                for every in (self.report, self.evaluation, self.save)
            )
        )


class Due(NamedTuple):
    """Whether a report, an evaluation and a checkpoint are due after a step."""

    report: bool = False
    evaluation: bool = False
    save: bool = False


class LearningRateSchedule(Section):
    """mlx-lm's `lr_schedule`: a schedule of `mlx.optimizers` by name, with its own warm-up."""

    name: Literal["linear_schedule", "exponential_decay", "step_decay", "cosine_decay"] = key(
        ..., "a schedule of mlx.optimizers"
    )
    arguments: tuple[float, ...] = key(..., "its arguments, in order", min_length=1)
    warmup: NonNegativeInt = key(0, "steps of warm-up before it")
    warmup_init: float = key(0.0, "the learning rate that the warm-up starts from")


def _require_model_and_data_in_form(schema: dict[str, Any]) -> None:
    """Make model and data required in a form, since mlx-lm's defaults are only examples."""
    lay_out_form(schema)
    schema["required"] = ["model", "data"]
    for name in schema["required"]:
        del schema["properties"][name]["default"]


if TYPE_CHECKING:  # what mypy knows of pydantic's own metaclass holds for a class derived from it
    _RootSection = Section
else:

    class _ToldAsOnTheCommandLine(type(Section)):
        """Has `FineTuneConfig(learning_rte=1)` say what a file with that key is told."""

        def __call__(cls, *args: object, **values: object) -> Any:
            """Create an instance; raise ConfigError with every problem of its values."""
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                problems = find_problems(cls, values)
                raise ConfigError(explain_problems(problems, f"{cls.__name__}(...)", {})) from error

    class _RootSection(Section, metaclass=_ToldAsOnTheCommandLine):
        """A section that is called with keys by people: in a notebook."""


class FineTuneConfig(_RootSection):
    """A whole fine-tune. The top level is mlx-lm's, with mlx-lm's defaults and meanings.

    `adapter_path` alone differs: a run keeps its adapter in its own directory, and copies it to
    `adapter_path` only where one is given. `train` is implied by the command.
    """

    model_config = ConfigDict(json_schema_extra=_require_model_and_data_in_form)

    model: str = key(
        "Qwen/Qwen3-0.6b",
        "the base model: a folder, or its name on the hub",
        affects="source",
        path="local_or_hub",
        in_loss="value",
    )
    data: str = key(
        "mlx-community/WikiSQL",
        "a folder with train.jsonl and valid.jsonl, a file or a pattern of files to train on, a "
        "data set of the hub, or s3://bucket/folder",
        affects="source",
        path="local_hub_or_bucket",
        in_loss="rows",
    )
    train: bool = key(True, "implied: these commands always train", affects="output", in_form=False)
    fine_tune_type: Literal["lora", "dora", "full"] = key(
        "lora", "what is trained: LoRA matrices, or every weight of the chosen layers"
    )
    optimizer: Optimizer = key(
        "adam", "an optimizer of mlx: adam, adamw, muon, sgd, adafactor, lion ..."
    )
    optimizer_config: dict[str, dict[str, Any]] = key(
        {}, "keyword arguments for each optimizer", in_form=False
    )
    seed: int = key(0, "seed of random numbers (the same seed gives the same run)", ge=0, lt=2**32)
    num_layers: CountOrAll = key(16, "how many of the last layers are trained (-1 is all)")
    batch_size: PositiveInt = key(4, "examples in a micro-batch", lt=2**31)
    iters: PositiveInt = key(1000, "micro-batches to train on", affects="length")
    val_batches: CountOrAll = key(25, "batches of an evaluation (-1: all, 0: none)", in_loss="rows")
    learning_rate: PositiveFloat = key(1e-5, "the step size, before schedule and warm-up")
    steps_per_report: Interval = key(
        10,
        "iterations between two reports, or below 1 a share of the run",
        affects="output",
        in_form=False,
    )
    steps_per_eval: Interval = key(
        200, "iterations between two evaluations, or below 1 a share of the run"
    )
    resume_adapter_file: str | None = key(
        None, "start from this adapters.safetensors, not from a fresh adapter", path="local"
    )
    adapter_path: str | None = key(
        None, "copy the adapter to this folder too", affects="output", path="local", in_form=False
    )
    save_every: SaveInterval = key(
        100,
        "iterations between two checkpoints, below 1 a share of the run, or minutes: 10m",
        affects="output",
    )
    test: bool = key(False, "compute the loss on test.jsonl at the end", affects="output")
    test_batches: CountOrAll = key(
        500, "batches of that loss (-1 is all)", affects="output", in_form=False
    )
    max_seq_length: int = key(
        2048, "tokens after which an example is overlong", ge=2, lt=2**31, in_loss="value"
    )
    grad_checkpoint: bool = key(
        False, "compute layers again in the backward pass: less memory, more time"
    )
    grad_accumulation_steps: PositiveInt = key(1, "micro-batches whose gradients make one step")
    clear_cache_threshold: NonNegativeInt = key(
        0,
        "bytes of MLX's cache above which it is emptied (0: never; on CUDA 64 MiB below 0.2e9 "
        "weights, else half of what the widest step needs)",
        affects="output",
        in_form=False,
    )
    lr_schedule: LearningRateSchedule | None = key(None, "schedule of the learning rate")
    lora_parameters: LoraParameters = key(LoraParameters(), "rank, scale and modules of LoRA")
    mask_prompt: bool = key(False, "train on the answers alone", in_loss="value")
    report_to: str | None = key(
        None,
        "report metrics to wandb or another service (docs/watching.md), or several: wandb,mlflow",
        affects="output",
        in_form=False,
    )
    project_name: str | None = key(
        None, "the project in these services", affects="output", in_form=False
    )
    trust_remote_code: bool = key(
        False,
        "run code that comes with the model: only if you trust it",
        affects="source",
        in_form=False,
        in_loss="value",
    )
    prompt_feature: str = key(
        "prompt", "the key of the prompt in a row", in_form=False, in_loss="value"
    )
    completion_feature: str = key(
        "completion", "the key of the completion in a row", in_form=False, in_loss="value"
    )
    text_feature: str = key(
        "text", "the key of plain text in a row", in_form=False, in_loss="value"
    )
    chat_feature: str = key(
        "messages", "the key of the messages in a row", in_form=False, in_loss="value"
    )
    data_format: DataFormat = key(
        "auto",
        "the format of the rows, of docs/data.md (auto finds it, csv takes tables alone)",
        in_form=False,
        in_loss="value",
    )
    drop_fields: Names = key(
        (),
        "fields of the rows that are left out on purpose, though they hold text",
        in_form=False,
        in_loss="value",
    )
    hf_dataset: HubDatasets = key(
        (), "data sets of the hub with their splits", in_form=False, in_loss="rows"
    )
    nested: NestedSection = key(NestedSection(), "tiers of parameters, each with its own frequency")
    training: TrainingSection = key(TrainingSection(), "clipping, warm-up, early stop, precision")
    data_policy: DataPolicy = key(DataPolicy(), "what becomes of overlong or repeated examples")
    samples: tuple[SamplePrompt, ...] = key(
        (), "prompts answered at each evaluation, to be read", affects="output", max_length=32
    )
    gate: GateSection = key(GateSection(), "thresholds of the gate", affects="output")
    registry: RegistrySection = key(
        RegistrySection(), "where a verified adapter goes", affects="output"
    )
    continual: ContinualSection = key(
        ContinualSection(), "whether a run starts from the champion", affects="source"
    )

    def find_conflicts(self) -> Iterator[str]:
        """Yield a message for each conflict between keys of different sections."""
        schedule = self.lr_schedule
        if schedule is not None and schedule.warmup and self.training.warmup_steps:
            yield "training.warmup_steps and lr_schedule.warmup: give only one of them"
        if schedule is not None and self.training.decay is not None:
            yield "training.decay and lr_schedule: give only one of them"
        yield from optimizer_problems(self.optimizer, self.optimizer_config, self.nested)
        known = {task.name for task in self.gate.tasks}
        for name in self.training.evaluate_tasks:
            if name not in known:
                yield f"training.evaluate_tasks: {name} is none of gate.tasks"
        if self.gate.check_fused and self.fine_tune_type == "full":
            yield "gate.check_fused: a full fine-tune has no adapter to fuse"
        yield from _loss_problems(self)
        yield from _continual_problems(self)
        for rules in seams.load_all(ConfigRules):
            yield from rules.problems(self)

    @property
    def offers_best_step(self) -> bool:
        """Whether a run with validation data offers its best step rather than its last."""
        offers_best = self.training.reference is None and self.training.offer == "best"
        return offers_best and self.val_batches != 0

    @property
    def length(self) -> str:
        """The configured length of the run: `1,000 iterations`, `3 epochs` or `5 minutes`."""
        epochs, minutes = self.training.epochs, self.training.minutes
        if minutes is not None:
            return f"{minutes:g} minutes" if minutes != 1 else "1 minute"
        if epochs is None:
            return f"{self.iters:,} iterations" if self.iters != 1 else "1 iteration"
        return f"{epochs:g} epochs" if epochs != 1 else "1 epoch"

    @property
    def length_and_tiers(self) -> str:
        """The run's length, and the tiers if there are many: `3 epochs, tiers every 1, 4 steps`."""
        if self.nested.frequencies == (1,):
            return self.length
        steps = ", ".join(map(str, self.nested.frequencies))
        return f"{self.length}, tiers every {steps} steps"

    @property
    def replay_fraction(self) -> float:
        """The share of the rows that are earlier examples, where a run goes on from an adapter.

        A run that follows the champion and gives no fraction has DEFAULT_REPLAY, unless it cannot
        replay: it is timed, made as by mlx_lm.lora, or the room is deleted. Any other has 0.
        """
        if (given := self.continual.replay.fraction) is not None:
            return given
        is_plain = self.training.reference is None and self.training.minutes is None
        follows = self.continual.start is not None and seams.is_there("replay")
        return DEFAULT_REPLAY if follows and is_plain else 0.0

    @property
    def gate_bounds(self) -> GateSection:
        """The section `gate` that judges: a `max_kl` of null is that of the loss, if it has one."""
        room = seams.find_room_of_loss(self.training.loss)
        if room is None or self.gate.max_kl is not None:
            return self.gate
        return self.gate.model_copy(update={"max_kl": room.loss_max_kl})

    def intervals(self, iterations: int, batches: int = 1) -> Intervals:
        """Return the intervals of a run of this many iterations; shares are rounded down.

        batches: the number of batches of an evaluation, which takes about half as long as as many
            iterations. A share that gives fewer iterations than that gives this number, so that a
            short run does not spend its time on evaluations.
        """

        def count(interval: float, least: int = 1) -> int:
            """Convert an interval to iterations, at least `least` for a share of the run."""
            return interval if isinstance(interval, int) else max(least, int(interval * iterations))

        save = self.save_every
        return Intervals(
            report=count(self.steps_per_report),
            evaluation=count(self.steps_per_eval, batches),
            save=None if isinstance(save, str) else count(save),
            save_seconds=60 * float(save.rstrip("m")) if isinstance(save, str) else None,
        )

    @property
    def optimizer_arguments(self) -> dict[str, object]:
        """The keyword arguments configured for the chosen optimizer."""
        return self.optimizer_config.get(self.optimizer, {})


@dataclass(frozen=True)
class ConfigRules:
    """What a room refuses in a configuration, beyond what the types of keys refuse.

    problems: called with every configuration; yields a sentence for each problem.
    """

    problems: Callable[[FineTuneConfig], Iterable[str]]


class LossRules(ConfigRules):
    """What a room refuses in a configuration whose `training.loss` is one of its losses."""


def _loss_problems(config: FineTuneConfig) -> Iterator[str]:
    """Yield conflicts between a room's loss (`training.loss`) and other keys."""
    loss, arguments = config.training.loss, config.training.loss_config
    if loss is None:
        if arguments:
            yield "training.loss_config: no training.loss is given that takes these"
        return
    try:
        rules = seams.load_for_loss(loss, LossRules)
    except ConfigError as error:
        yield str(error).removesuffix(".")
        return
    yield from rules.problems(config)


def _continual_problems(config: FineTuneConfig) -> Iterator[str]:
    """Yield conflicts of section `continual` with other keys.

    The section is about a run that goes on from the registry's champion (`continual.from`, here
    `start`), and about replay: training on examples of earlier runs again.
    """
    replay = config.continual.replay
    if config.continual.start is None:
        if replay.fraction and replay.is_lineage:
            yield (
                "continual.replay.sources: lineage is that of the champion, and needs "
                "continual.from: champion; or give files"
            )
        return
    if config.registry.path is None:
        yield "continual.from: champion needs a registry path and name"
    if config.resume_adapter_file is not None:
        yield "continual.from and resume_adapter_file: give only one of them"
    if config.continual.policy != "continue" and not config.registry.keep_data:
        yield (
            f"continual.policy: {config.continual.policy} trains on what the registry keeps, and "
            f"registry.keep_data is false: let it be true, or give policy: continue"
        )
