"""The sections of the configuration: one class each, with one line for each key.

No key of `gate` can make the gate pass an adapter.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from nested_core import seams
from nested_core.config.names import NAME_PATTERN, why_invalid_adapter_name
from nested_core.config.section_base import Section, key

NonEmpty = Annotated[str, Field(min_length=1)]


def text_as_list(value: object) -> object:
    """Convert a single text to a list of one."""
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[NonEmpty, ...], BeforeValidator(text_as_list)]

Processes = Annotated[PositiveInt, Field(le=64)]
MAX_MINUTES = 7 * 24 * 60


def parse_interval(value: float) -> float:
    """Return a whole number of iterations as an int, or a share of the run between 0 and 1.

    Raises ValueError for any other number.
    """
    if 0 < value < 1:
        return value
    if not value.is_integer():
        raise ValueError(
            f"a whole number of iterations, or a share of the run below 1, such as 0.1; "
            f"found {value:g}"
        )
    return int(value)


MINUTES_PATTERN = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)m")


def parse_save_interval(value: float | str) -> float | str:
    """Return a number as `parse_interval` does, if above 0, or minutes such as `10m` unchanged."""
    if isinstance(value, str):
        minutes = MINUTES_PATTERN.fullmatch(value)
        if minutes is None or not 0 < float(minutes[1]) < MAX_MINUTES:
            raise ValueError(
                f"iterations, a share of the run below 1, or minutes such as 10m; found {value!r}"
            )
        return value
    if not 0 < value < 2**31:
        raise ValueError(f"should be greater than 0 and below 2**31; found {value:g}")
    return parse_interval(value)


def parse_hang_timeout(value: float | str) -> float | str:
    """Return `auto`, or seconds above 0; ValueError for anything else."""
    if value == "auto" or (not isinstance(value, str) and value > 0):
        return value
    raise ValueError(f"auto, seconds above 0, or null for none; found {value!r}")


# As an int it is a number of them, as a float a share of the run.
NumberOrShare = Annotated[
    float, Field(ge=0, lt=2**31), AfterValidator(parse_interval), PlainSerializer(lambda it: it)
]

SaveInterval = Annotated[
    float | str, AfterValidator(parse_save_interval), PlainSerializer(lambda it: it)
]
HangTimeout = Annotated[float | str, AfterValidator(parse_hang_timeout)]


class TrainingSection(Section):
    """How the training loop runs, beyond what mlx-lm knows."""

    max_grad_norm: NonNegativeFloat = key(0.0, "gradients are clipped to this norm (0 is off)")
    warmup_steps: NumberOrShare = key(
        0, "optimizer steps until the full learning rate, or below 1 a share of the run's"
    )
    decay: Literal["cosine"] | None = key(
        None, "cosine: the learning rate falls to a tenth by the last step (null: it stays)"
    )
    epochs: PositiveFloat | None = key(
        None, "passes over the data, in place of iters (a flag --iters wins over a file's epochs)"
    )
    minutes: Annotated[PositiveFloat, Field(lt=MAX_MINUTES)] | None = key(
        None, "minutes of a command with its verdict, in place of iters", affects="length"
    )
    supervise: Literal["last", "all"] = key(
        "last", "assistant turns to train on, in a chat", in_loss="value"
    )
    loss: NonEmpty | None = key(
        None, "a loss on other rows than answers to learn (null: cross-entropy)", in_loss="value"
    )
    loss_config: dict[str, Any] = key(
        {}, "keyword arguments of that loss", in_form=False, in_loss="value"
    )
    early_stop_patience: PositiveInt | None = key(
        None, "stop after so many evaluations without improvement"
    )
    min_delta: NonNegativeFloat = key(1e-4, "least fall of the loss that counts as improvement")
    keep_checkpoints: PositiveInt = key(5, "checkpoints kept, with the best and the last always")
    precision: Literal["auto", "float32", "bfloat16"] = key(
        "auto",
        "dtype of the passes (auto: float32 on a CPU, on a GPU the dtype of the stored model)",
        in_loss="value",
    )
    memory_limit_gb: PositiveFloat | None = key(None, "GB of the device's memory to stay within")
    max_nonfinite_steps: PositiveInt = key(5, "steps in a row until the run ends as diverged")
    flat_loss_reports: int = key(10, "warn when the loss has not moved for so many reports", ge=2)
    sample_tokens: PositiveInt = key(64, "most tokens of an answer to samples", affects="output")
    processes: Processes = key(1, "local processes that share each batch", affects="ranks")
    hostfile: str | None = key(
        None, "mlx.launch's list of machines, for processes", affects="ranks", path="local"
    )
    offer: Literal["best", "last"] = key(
        "best", "the adapter that is selected: of the best step, or of the last"
    )
    restarts: NonNegativeInt = key(
        3, "times a killed run is begun again without a new checkpoint", affects="output"
    )
    hang_timeout: HangTimeout | None = key(
        "auto",
        "seconds without a step until ranks that wait are ended (auto: ten times the longest "
        "step, a minute at least)",
        affects="output",
        in_form=False,
    )
    evaluate_tasks: Names = key((), "suites of gate.tasks: a small part is asked at evaluations")
    select_by: str = key(
        "loss", "what chooses the best step: loss, or the answers to one of evaluate_tasks"
    )
    reference: Literal["mlx_lm"] | None = key(
        None, "do what mlx_lm.lora does, bit for bit", in_loss="value"
    )

    def find_conflicts(self) -> Iterator[str]:
        """Yield conflicts of the run's length, and of what selects the best step."""
        if self.minutes is not None and self.epochs is not None:
            yield f"epochs {self.epochs:g} and minutes {self.minutes:g}: give one of them"
        if self.select_by not in ("loss", *self.evaluate_tasks):
            yield f"select_by: {self.select_by} is neither loss nor among evaluate_tasks"
        if self.select_by != "loss" and (self.processes, self.hostfile) != (1, None):
            yield f"select_by: {self.select_by} chooses in one process; leave processes out"
        if self.select_by != "loss" and self.offer != "best":
            yield f"select_by: {self.select_by} chooses the best step, and offer is {self.offer}"


Frequencies = Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=8)]


class Assignment(Section):
    """One rule of the manual strategy: names that match the pattern go to the tier."""

    match: str = key(..., "a regular expression over parameter names")
    tier: NonNegativeInt = key(..., "the tier that they go to (0 is the fastest)")

    def find_conflicts(self) -> Iterator[str]:
        """Yield a problem if the pattern is no regular expression."""
        try:
            re.compile(self.match)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"{self.match!r:.80} is not a regular expression: {error}"


class NestedSection(Section):
    """Tiers of parameters, each updated every so many optimizer steps."""

    frequencies: Frequencies = key((1,), "one a tier, ascending: updated every so many steps")
    strategy: Literal["layer_depth", "parameter_importance", "manual"] = key(
        "layer_depth", "what decides a parameter's tier"
    )
    fast: Literal["shallow", "deep"] = key("shallow", "end of the model updated at every step")
    slow_gradients: Literal["skip", "accumulate"] = key(
        "skip", "gradients of a tier that is not due: not computed, or gathered until it is due"
    )
    accumulate: Literal["mean", "sum"] = key("mean", "what becomes of gathered gradients")
    learning_rate_scale: tuple[NonNegativeFloat, ...] | None = key(
        None, "one multiplier of the learning rate for each tier (null is 1 each)"
    )
    weight_decay: tuple[NonNegativeFloat, ...] | None = key(
        None, "one weight decay a tier (null is the optimizer's)"
    )
    assignments: tuple[Assignment, ...] = key((), "for the strategy manual (the first match wins)")
    probe_batches: PositiveInt = key(8, "batches that parameter_importance measures gradients on")

    def find_conflicts(self) -> Iterator[str]:
        """Yield conflicts between the keys of section `nested`.

        A tier is a group of parameters; tier i is updated every frequencies[i] steps. Assignments
        put parameters into tiers by their names.
        """
        tiers = len(self.frequencies)
        if list(self.frequencies) != sorted(self.frequencies):
            yield f"frequencies must ascend, fastest first; got {self.frequencies}"
        for name in ("learning_rate_scale", "weight_decay"):
            values = getattr(self, name)
            if values is not None and len(values) != tiers:
                yield f"{name} needs one number a tier ({tiers}), got {len(values)}"
        if (self.strategy == "manual") != bool(self.assignments):
            yield "strategy manual needs assignments, and only manual takes them"
        for assignment in self.assignments:
            if assignment.tier >= tiers:
                yield (
                    f"the assignment {assignment.match!r} names tier {assignment.tier}; "
                    f"{tiers} frequencies make tiers 0 to {tiers - 1}"
                )


DEFAULT_RANK = 8
Dropout = Annotated[float, Field(ge=0, lt=1)]
Modules = Annotated[tuple[str, ...], Field(min_length=1)]


class LoraParameters(Section):
    """The low-rank matrices: their rank, the factor on their product, where they go (`keys`).

    `alpha` may be given in place of `scale`, and becomes the scale that it means: alpha / rank
    (peft/tuners/lora/layer.py); the attribute is None then, and is written nowhere. The attribute
    of `keys` is not called so, or dict() would take the section for a mapping.
    """

    rank: PositiveInt = key(DEFAULT_RANK, "rank of the two LoRA matrices")
    dropout: Dropout = key(0.0, "share of the inputs left out in training")
    scale: PositiveFloat = key(20.0, "multiplier of the LoRA update")
    alpha: PositiveFloat | None = key(
        None, "in place of scale, which is alpha / rank then, as in PEFT", exclude=True
    )
    modules: Modules | None = key(
        None, "names of the modules that get an adapter (null: all linear ones)", alias="keys"
    )

    @model_validator(mode="before")
    @classmethod
    def _convert_alpha(cls, values: object) -> object:
        """Replace `alpha` by the scale that it means, alpha / rank.

        values: the section as it was given, before it is validated; returned as it is if it is no
            mapping or has no `alpha`. A null `alpha` is left out.

        Raises ValueError if both `alpha` and `scale` are given, and for a bad value.
        """
        if not isinstance(values, dict) or "alpha" not in values:
            return values
        others = {key: value for key, value in values.items() if key != "alpha"}
        alpha, rank = values["alpha"], others.get("rank", DEFAULT_RANK)
        if alpha is None:
            return others
        if others.get("scale") is not None:
            raise ValueError(
                f"alpha and scale say the same thing (scale = alpha / rank); found alpha {alpha!r} "
                f"and scale {others['scale']!r}: give one of them"
            )
        if not _is_number(alpha) or not 0 < alpha <= sys.float_info.max:
            raise ValueError(f"alpha should be a finite number above 0; found {alpha!r:.80}")
        if not _is_number(rank) or not rank >= 1:
            raise ValueError(f"rank should be a whole number above 0; found {rank!r:.80}")
        return others | {"scale": alpha / rank}


def _is_number(value: object) -> bool:
    """Return whether a value is a number and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)


MLX_LM_OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")


@cache
def optimizer_classes() -> dict[str, type]:
    """Return mlx's optimizer classes by lower-case name, and those registered by `name_optimizer`.

    The first call imports mlx, which takes some 0.2 s.
    """
    from mlx import optimizers

    classes = [value for value in vars(optimizers).values() if isinstance(value, type)]
    return {
        cls.__name__.lower(): cls
        for cls in classes
        if "learning_rate" in inspect.signature(cls).parameters
    }


def name_optimizer(value: object) -> object:
    """Register an optimizer class of the user under its name; return the name.

    A value that is no class is returned as it is. Only Python code can pass a class; no name in a
    YAML file leads to code that was not passed before. Raises ValueError for a class without a
    learning_rate, or with the name of another one.
    """
    if not isinstance(value, type):
        return value
    name = value.__name__.lower()
    if "learning_rate" not in inspect.signature(value).parameters:
        raise ValueError(f"{value.__name__} takes no learning_rate, as mlx's optimizers do")
    if optimizer_classes().setdefault(name, value) is not value:
        raise ValueError(f"there is another optimizer of the name {name}: rename the class")
    return name


def parse_optimizer_name(name: str) -> str:
    """Return the name in lower case, as mlx_lm.lora does; ValueError for an unknown optimizer."""
    name = name.lower()
    if name not in MLX_LM_OPTIMIZERS and name not in optimizer_classes():
        raise ValueError(f"{name!r} is no optimizer; there are {sorted(optimizer_classes())}")
    return name


def optimizer_problems(
    optimizer: str, optimizer_config: Mapping[str, Mapping[str, object]], nested: NestedSection
) -> Iterator[str]:
    """Yield settings in `optimizer_config` and `nested` that the optimizer does not support.

    optimizer: the chosen optimizer's name.
    optimizer_config: arguments by optimizer, also of optimizers that are not chosen.
    nested: the section on tiers, which can set weight decay and scale the learning rate by tier.
    """
    # Names of mlx-lm's optimizers are known without importing mlx
    others = optimizer_config.keys() - set(MLX_LM_OPTIMIZERS)
    unknown_names = sorted(name for name in others if name not in optimizer_classes())
    if unknown_names:
        known = sorted(optimizer_classes())
        yield f"optimizer_config: {unknown_names} are no optimizers; there are {known}"
    arguments = optimizer_config.get(optimizer, {})
    if not arguments and nested.weight_decay is None and nested.learning_rate_scale is None:
        return  # nothing to ask mlx for
    defaults = default_arguments(optimizer)
    unknown = arguments.keys() - defaults
    if unknown:
        yield (
            f"optimizer_config.{optimizer} does not take {sorted(unknown)}; "
            f"it takes {sorted(defaults)}"
        )
    if nested.weight_decay is not None and "weight_decay" not in defaults:
        yield f"nested.weight_decay needs optimizer: adamw or another with one, not {optimizer}"
    computes_rate = (defaults | dict(arguments)).get("relative_step", False)
    if nested.learning_rate_scale is not None and computes_rate:
        yield (
            f"nested.learning_rate_scale: {optimizer} computes its own step size; give "
            f"optimizer_config.{optimizer}.relative_step: false"
        )


def default_arguments(optimizer: str) -> dict[str, object]:
    """Return the arguments of an optimizer except its learning rate, with mlx's defaults."""
    parameters = inspect.signature(optimizer_classes()[optimizer]).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "learning_rate"}


LOAD_DATASET_ARGUMENTS_WITH_OWN_KEYS = {"path", "split"}  # arguments of datasets.load_dataset


class HubDataset(Section):
    """One data set, which splits of it to read, and the columns that hold the fields."""

    path: NonEmpty = key(..., "the data set's name on the hub, or a folder", path="local_or_hub")
    config: dict[str, object] = key({}, "keyword arguments of datasets.load_dataset")
    train_split: str = key("train[:80%]", "the split to train on")
    valid_split: str = key("train[-10%:]", "the split to validate on")
    test_split: str | None = key(None, "the split to test on")
    prompt_feature: str = key("prompt", "the column of the prompt")
    completion_feature: str = key("completion", "the column of the completion")
    text_feature: str = key("text", "the column of plain text")
    chat_feature: str = key("messages", "the column of the messages")

    @model_validator(mode="before")
    @classmethod
    def _refuse_name_outside_config(cls, value: object) -> object:
        """Refuse the key `name`, which belongs in `config`."""
        if isinstance(value, dict) and "name" in value:
            raise ValueError(
                "name is not read by mlx-lm either; a configuration of the data set is "
                f"chosen by config: {{name: {value['name']}}}"
            )
        return value

    def find_conflicts(self) -> Iterator[str]:
        """Yield a problem if `config` repeats an argument that has a key of its own."""
        if twice := LOAD_DATASET_ARGUMENTS_WITH_OWN_KEYS & self.config.keys():
            yield f"config: {sorted(twice)} have keys of their own: path, train_split"


def _mapping_as_list(value: object) -> object:
    """Convert a single mapping to a list of one, as mlx-lm does."""
    return [value] if isinstance(value, dict) else value


HubDatasets = Annotated[tuple[HubDataset, ...], BeforeValidator(_mapping_as_list)]


# The format of the rows, but csv: the files are tables, whose rows are found out as by auto.
def parse_data_format(name: str) -> str:
    """Return the name of a row format; ValueError for an unknown one."""
    if name != "auto":
        known = seams.load("nested_core.data.lines.example_parsing:DATA_FORMATS")
        if name not in known:
            raise ValueError(f"{name!r} is no format of rows; there are {', '.join(known)}")
    return name


DataFormat = Annotated[str, AfterValidator(parse_data_format)]


class DataPolicy(Section):
    """What happens to examples that are too long, repeated, or in a held-out set as well."""

    overlong: Literal["truncate", "drop", "error"] = key(
        "truncate", "examples above max_seq_length", in_loss="value"
    )
    duplicates: Literal["keep", "drop"] = key("keep", "training examples that come twice")
    leakage: Literal["error", "drop"] = key("error", "training examples in a held-out set as well")
    near_duplicates: Literal["warn", "error", "off"] = key(
        "warn", "held-out examples that nearly are a training example"
    )
    roles: Literal["strict", "template"] = key(
        "strict",
        "roles and order of a chat: by our rules, or whatever the chat template takes",
        in_loss="value",
    )
    group: NonEmpty | None = key(
        None,
        "a field of the rows, such as a document: held-out rows with one value count as one",
        in_loss="rows",
    )


Share = Annotated[float, Field(ge=0, le=1)]
Score = Literal["exact", "contains", "regex", "number", "json", "choice", "python"]
TASK_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
# The splits that a value of held_out stands for, the first one that is there; others are files.
SPLITS_BY_HELD_OUT_CHOICE = {"auto": ("test", "valid"), "test": ("test",), "valid": ("valid",)}
SCORER_FUNCTION_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


class TaskSection(Section):
    """One suite of questions that the adapter has to answer, and the bounds of its score."""

    name: str = key(..., "its name in messages and in gate.json", pattern=TASK_NAME_PATTERN)
    file: str = key(..., "questions and expected answers: JSON Lines, CSV or YAML", path="local")
    score: Score = key(..., "how an answer is compared with the expected one")
    function: str | None = key(None, "for python, module:function", pattern=SCORER_FUNCTION_PATTERN)
    min: Share | None = key(None, "the least share of right answers")
    max_drop: Share | None = key(0.0, "the largest drop of that share (null allows any)")
    min_gain: Share | None = key(None, "the smallest gain of that share")
    max_tokens: PositiveInt = key(64, "most tokens of an answer", lt=2**20)
    stop: Names = key((), "texts at which an answer ends")
    temperature: NonNegativeFloat = key(0.0, "0 takes the likeliest token")
    seed: int = key(0, "seed of the sampling if the temperature is above 0", ge=0, lt=2**32)
    tolerance: NonNegativeFloat = key(
        0.0, "for score number: the tolerance of questions without their own"
    )
    canary: bool = key(
        False, "record its answers, so that a server can check a new champion against them"
    )

    def find_conflicts(self) -> Iterator[str]:
        """Yield conflicts between the kind of score and its arguments."""
        if (self.function is not None) != (self.score == "python"):
            yield "score: python needs a function, module:function; no other score has one"
        if self.tolerance and self.score != "number":
            yield f"tolerance: for score: number; {self.score} compares no numbers"


class ControlsSection(Section):
    """The controls: comparisons that show failures for which there is no rule."""

    prompts: bool = key(True, "held-out answers after other rows' prompts")
    surprises: bool = key(False, "training rows that the finished adapter contradicts")
    probes: bool = key(False, "answers to neutral prompts of other kinds")
    plan: bool = key(True, "whether rates and rows were used as planned")
    lookup: bool = key(True, "what looking held-out questions up in train answers")
    shapes: bool = key(True, "rows, shapes and labels that the champion's training had")


class GateSection(Section):
    """The bounds that the gate judges by; they are recorded in gate.json."""

    held_out: str = key(
        "auto",
        "examples that the gate uses: valid, test, a JSON Lines file, or auto (test before valid)",
        path="local_or_split",
        min_length=1,
        in_loss="rows",
    )
    max_val_loss_increase: NonNegativeFloat = key(
        0.02,
        "non-inferiority margin: the relative rise of the held-out loss that is allowed (at least "
        "0.01 nats/token); 0.0 allows no rise",
    )
    max_harmed_share: Share = key(
        0.01, "share of examples that may lose more than 1 nat/token while few gain as much"
    )
    samples: Literal["warn", "fail"] = key(
        "warn",
        "if training broke most answers to sample prompts: warn prevents automatic promotion, "
        "fail rejects the adapter",
    )
    min_relative_change: NonNegativeFloat = key(
        0.0, "the smallest relative change that at least one tensor must have"
    )
    max_skipped_share: Share = key(
        0.01, "largest share of a tier's updates that may be skipped for non-finite gradients"
    )
    general_data: str | None = key(
        None, "JSON Lines of text that the adapter must not forget", path="local"
    )
    max_general_loss_increase: NonNegativeFloat | None = key(
        None, "allowed relative rise of the loss on general_data"
    )
    max_ancestor_loss_increase: NonNegativeFloat | None = key(
        None,
        "allowed relative rise of the champion's loss on what its ancestors were judged by (null: "
        "measured, and no reason to reject)",
    )
    check_fused: bool = key(False, "check the adapter fused into the base model too")
    max_kl: NonNegativeFloat | None = key(
        None, "largest mean KL divergence from the start, nats/token (null: none, or the loss's)"
    )
    max_chosen_fall: NonNegativeFloat | None = key(
        1.0, "how far chosen answers may become less likely, nats/token (null: without bound)"
    )
    drift: bool = key(False, "record the KL divergence from the base model too")
    controls: ControlsSection = key(ControlsSection(), "comparisons that only warn")
    tasks: tuple[TaskSection, ...] = key((), "eval sets that the adapter has to answer")
    allow_python_scorers: bool = key(
        False, "let tasks run Python functions with your rights; never a flow's parameter"
    )
    noise: Literal["paired", "none"] = key(
        "paired", "whether paired 95 % intervals decide, or (none) means and thresholds alone"
    )

    def find_conflicts(self) -> Iterator[str]:
        """Yield conflicts between general text and its bound, and between suites."""
        if (self.general_data is None) != (self.max_general_loss_increase is None):
            yield "gate needs general_data and max_general_loss_increase, or neither"
        names = [task.name for task in self.tasks]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"gate.tasks: two have the name {name}"
        for task in self.tasks:
            if task.score == "python" and not self.allow_python_scorers:
                yield (
                    f"gate.tasks: {task.name} is scored by {task.function}, which would run with "
                    f"your rights; set gate.allow_python_scorers if you trust it"
                )


def _require_adapter_name(name: object) -> object:
    """Return a valid name of an adapter; ValueError for any other text."""
    if isinstance(name, str) and (reason := why_invalid_adapter_name(name)) is not None:
        raise ValueError(reason.removesuffix("."))
    return name


AdapterName = Annotated[
    str, Field(pattern=f"^{NAME_PATTERN.pattern}$"), BeforeValidator(_require_adapter_name)
]


class RegistrySection(Section):
    """Where verified adapters go, and which of them become champion by themselves.

    `better` asks for a loss that is lower than the champion's on the same held-out examples (of a
    first version, than its initial adapter's) by more than `min_improvement`, with the 95 %
    interval of the difference below 0; `approve` leaves it to a person.
    """

    path: str | None = key(None, "the registry's folder, on the worker's machine", path="local")
    name: AdapterName | None = key(None, "the adapter's name in the registry")
    promote: Literal["never", "always", "better", "approve"] = key(
        "never", "whether a verified adapter becomes champion; better: on the same held-out data"
    )
    min_improvement: NonNegativeFloat = key(
        0.005, "for better: nats/token by which the loss must fall at least"
    )
    require_validation: bool = key(True, "promote nothing that was not validated")
    keep_data: bool = key(True, "keep the examples of registered versions, for replay and the gate")
    mirror: str | None = key(
        None, "where others read versions and champion, as s3://bucket/prefix", path="bucket"
    )

    @property
    def location(self) -> tuple[Path, str] | None:
        """The registry's folder and the adapter's name in it; None without a registry."""
        return None if self.path is None or self.name is None else (Path(self.path), self.name)

    def find_conflicts(self) -> Iterator[str]:
        """Yield conflicts between path, name and the promotion mode."""
        if (self.path is None) != (self.name is None):
            yield "registry needs both path and name, or neither"
        if self.promote != "never" and self.path is None:
            yield f"promote: {self.promote} needs a registry path and name"
        if self.mirror is not None and self.path is None:
            yield "registry.mirror needs a registry path and name"


LINEAGE = "lineage"


class ReplaySection(Section):
    """Examples of earlier nights that are trained on too, so that they are not forgotten.

    `fraction` 0 mixes none. FineTuneConfig.replay_fraction says what null is. `sources` is lineage,
    for what the champion and its ancestors were trained on, or files and folders as `data` takes
    them, the newest first.
    """

    fraction: float | None = key(
        None,
        "share of the rows that are earlier examples (null: 0.5 if the run follows a champion)",
        affects="training",
        ge=0,
        lt=1,
    )
    sources: Names = key(
        (LINEAGE,),
        "where they are from: lineage, the data of the champion and its ancestors, or files and "
        "folders, newest first",
        path="local_or_lineage",
        min_length=1,
    )
    max_generations: PositiveInt | None = key(
        None, "how many of the newest sources are used (null is all)", affects="training"
    )
    weighting: Literal["uniform", "recent"] = key(
        "uniform",
        "uniform: each example as often as any other; recent: half as often with each generation",
        affects="training",
    )
    missing: Literal["warn", "error"] = key(
        "warn", "if a source is gone or changed: go on with the rest, or end", affects="output"
    )
    keep: PositiveInt | None = key(
        None, "bytes of examples that the registry keeps for a name (null: all)", affects="output"
    )

    @property
    def is_lineage(self) -> bool:
        """Whether the replayed examples are those of the champion and its ancestors."""
        return self.sources == (LINEAGE,)

    def find_conflicts(self) -> Iterator[str]:
        """Yield a problem if `lineage` is listed together with other sources."""
        if LINEAGE in self.sources and not self.is_lineage:
            yield "sources: lineage stands alone; give it, or files"


class ContinualSection(Section):
    """How a run follows the champion; `from` is the champion, or nothing.

    `continue` goes on from it, at a share of `learning_rate`, which is the first night's. `rebuild`
    trains from the base on the run's data and all that the champion's lineage was trained on.
    `auto` rebuilds while that fits into `window`. With `skip_unchanged`, a run on data and settings
    that the champion was trained with already ends before it begins, and so does one that made no
    champion before.
    """

    start: Literal["champion"] | None = key(
        None, "champion: follow the registry's champion, and be no worse than it", alias="from"
    )
    policy: Literal["continue", "rebuild", "auto"] = key(
        "continue", "go on from the champion, rebuild from the base on all kept data, or auto"
    )
    window: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?[smh]$")] = key(
        "2h", "for auto: how long a rebuilt run may take, as 90m, 2h or 45s"
    )
    rate: float = key(
        1.0,
        "share of learning_rate at which a run goes on from the champion",
        affects="training",
        gt=0,
        le=1,
    )
    allow_high_rate: bool = key(
        False, "go on even where rank x scale x rate is above 0.05, at which runs diverge"
    )
    skip_unchanged: bool = key(True, "end before training if the same run was made before")
    replay: ReplaySection = key(ReplaySection(), "examples of earlier nights, trained on too")

    @property
    def window_seconds(self) -> float:
        """The key `window` in seconds."""
        return float(self.window[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.window[-1]]

    def find_conflicts(self) -> Iterator[str]:
        """Yield conflicts of policies that rebuild: these need a champion and its lineage."""
        if self.policy == "continue":
            return
        if self.start is None:
            yield f"policy: {self.policy} needs from: champion"
        if not self.replay.is_lineage:
            yield f"policy: {self.policy} trains on the lineage: leave replay.sources out"
