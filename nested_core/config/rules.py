"""Which parts of a configuration have to agree: every rule yields its problem, none raises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nested_core.config.adapter_names import why_no_name

if TYPE_CHECKING:
    from nested_core.config.gate import GateSection
    from nested_core.config.registry import RegistrySection
    from nested_core.config.schema import FineTuneConfig, NestedSection

OPTIMIZER_ARGUMENTS = {
    "adam": {"betas", "eps", "bias_correction"},
    "adamw": {"betas", "eps", "bias_correction", "weight_decay"},
    "muon": {"momentum", "weight_decay", "nesterov", "ns_steps"},
    "sgd": {"momentum", "weight_decay", "dampening", "nesterov"},
    "adafactor": {"eps", "clip_threshold", "decay_rate", "beta_1", "weight_decay"}
    | {"scale_parameter", "relative_step", "warmup_init"},
}
# What a reference run may set in `training`: none of it changes what mlx_lm.lora computes.
FREE_IN_A_REFERENCE = frozenset(
    {"reference", "keep_checkpoints", "memory_limit_gb", "flat_loss_reports"}
    | {"max_nonfinite_steps", "min_delta"}
    | {"processes", "hostfile"}  # refused by themselves
)


class Disagreements(ValueError):
    """All that does not agree in one section, a line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


def refuse(problems: Iterable[str]) -> None:
    """Raise Disagreements where there is any problem."""
    found = tuple(problems)
    if found:
        raise Disagreements(found)


def tier_problems(section: NestedSection) -> Iterator[str]:
    """Frequencies, numbers a tier and assignments."""
    tiers = len(section.frequencies)
    if list(section.frequencies) != sorted(section.frequencies):
        yield f"frequencies must ascend, fastest first; got {section.frequencies}"
    for name in ("learning_rate_scale", "weight_decay"):
        values = getattr(section, name)
        if values is not None and len(values) != tiers:
            yield f"{name} needs one number a tier ({tiers}), got {len(values)}"
    if (section.strategy == "manual") != bool(section.assignments):
        yield "strategy manual needs assignments, and only manual takes them"
    for rule in section.assignments:
        if rule.tier >= tiers:
            yield (
                f"the assignment {rule.match!r} names tier {rule.tier}; "
                f"{tiers} frequencies make tiers 0 to {tiers - 1}"
            )


def registry_problems(section: RegistrySection) -> Iterator[str]:
    """Path, name and what is promoted."""
    if (section.path is None) != (section.name is None):
        yield "registry needs both path and name, or neither"
    if section.promote != "never" and section.path is None:
        yield f"promote: {section.promote} needs a registry path and name"
    if section.name is not None and (reason := why_no_name(section.name)):
        yield reason


def gate_problems(section: GateSection) -> Iterator[str]:
    """The general text and its bound."""
    if (section.general_data is None) != (section.max_general_loss_increase is None):
        yield "gate needs general_data and max_general_loss_increase, or neither"


def agreement_problems(config: FineTuneConfig) -> Iterator[str]:
    """What sections ask of each other."""
    schedule = config.lr_schedule
    if schedule is not None and schedule.warmup and config.training.warmup_steps:
        yield "training.warmup_steps and lr_schedule.warmup: give only one of them"
    yield from _optimizer_problems(config)
    if config.nested.weight_decay is not None and config.optimizer != "adamw":
        yield "nested.weight_decay needs optimizer: adamw"
    has_one_clock = config.nested.frequencies == (1,) and config.nested.learning_rate_scale is None
    if config.optimizer not in ("adam", "adamw") and not has_one_clock:
        yield f"optimizer {config.optimizer} has one clock: nested.frequencies [1]"
    if config.gate.check_fused and config.fine_tune_type == "full":
        yield "gate.check_fused: a full fine-tune has no adapter to fuse"
    yield from _rank_problems(config)
    yield from _reference_problems(config)
    yield from _continual_problems(config)


def _rank_problems(config: FineTuneConfig) -> Iterator[str]:
    """Ranks share a batch; whether the hosts of a hostfile can is seen when it is read."""
    training, batch_size = config.training, config.batch_size
    if training.hostfile is not None and training.processes != 1:
        yield "training.processes and training.hostfile: give only one; each host is a rank"
    if batch_size % training.processes:
        yield (
            f"batch_size {batch_size} is the batch of all ranks together: training.processes "
            f"{training.processes} does not divide it"
        )
    if training.reference is not None and (training.processes, training.hostfile) != (1, None):
        yield "training.reference: one process; leave training.processes and hostfile out"


def _continual_problems(config: FineTuneConfig) -> Iterator[str]:
    if config.continual.start is None:
        return
    if config.registry.path is None:
        yield "continual.from: champion needs a registry path and name"
    if config.resume_adapter_file is not None:
        yield "continual.from and resume_adapter_file: give only one of them"


def _optimizer_problems(config: FineTuneConfig) -> Iterator[str]:
    strange = config.optimizer_config.keys() - OPTIMIZER_ARGUMENTS
    if strange:
        yield (
            f"optimizer_config: {sorted(strange)} are no optimizers; there are "
            f"{sorted(OPTIMIZER_ARGUMENTS)}"
        )
    allowed = OPTIMIZER_ARGUMENTS[config.optimizer]
    unknown = config.optimizer_arguments.keys() - allowed
    if unknown:
        yield (
            f"optimizer_config.{config.optimizer} does not take {sorted(unknown)}; "
            f"it takes {sorted(allowed)}"
        )


def _reference_problems(config: FineTuneConfig) -> Iterator[str]:
    """A reference run does what mlx_lm.lora does, and nothing that it does not."""
    if config.training.reference is None:
        return
    training, nested = config.training, config.nested
    defaults = type(training)()
    changed = [
        f"training.{name}"
        for name in type(training).model_fields
        if name not in FREE_IN_A_REFERENCE and getattr(training, name) != getattr(defaults, name)
    ]
    if nested != type(nested)():
        changed.append("nested")
    if config.data_policy != type(config.data_policy)():
        changed.append("data_policy")
    if changed:
        yield f"training.reference: mlx_lm.lora knows nothing of {', '.join(changed)}"
