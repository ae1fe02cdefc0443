"""The policy of a name: the minimum that an automatic promotion needs, whatever a run asks for.

The last line `policy` of the history counts; REGISTRY/NAME/policy.json shows it to people. Of
policy and run's sections the stricter counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection, TaskSection
from nested_core.errors import ConfigError, DamagedError, describe_first_problem
from nested_core.registry.folders import check_name, create_name_folder, name_exists
from nested_core.registry.ledger import LEDGER_NAME, Ledger
from nested_core.registry.link_and_views import reading, writing_folder
from nested_core.registry.versions import resolve_version

NIGHTS_PREFIX = "nights:"
APPROVE_KEY = "registry.promote: approve"  # what asks for the room approval
NO_REFERENCE = (
    "promote is always without a reference, so that nothing limits what the small losses of many "
    "promotions add up to (`nested-tune policy NAME --reference nights:30` would)"
)
PromotionMode = Literal["never", "approve", "better", "always"]


class RegistryPolicy(BaseModel):
    """The content of policy.json; None leaves a key to the run's configuration.

    promote: as registry.promote. Of `approve` in one and `better` in the other both count.
    max_val_loss_increase: as gate.max_val_loss_increase.
    tasks: as gate.tasks, with absolute paths.
    reference: the version that no automatic promotion may be worse than by more than one margin:
        its digest, or `nights:N` for the champion of N promotions ago; None requires no comparison.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    promote: PromotionMode | None = None
    max_val_loss_increase: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    tasks: tuple[TaskSection, ...] = Field(default=(), strict=False)
    reference: str | None = Field(
        default=None, pattern=rf"^({NIGHTS_PREFIX}[1-9][0-9]{{0,3}}|[0-9a-f]{{64}})$"
    )

    def reference_versions(self, ledger: Ledger) -> list[str]:
        """Return the reference version, and those that become it after the next promotions."""
        if self.reference is None:
            return []
        if self.reference.startswith(NIGHTS_PREFIX):
            return ledger.recent_champions(int(self.reference.removeprefix(NIGHTS_PREFIX)))
        return [self.reference]

    def find_reference(self, ledger: Ledger) -> str | None:
        """Return the version that `reference` means today; None without a reference."""
        return next(iter(self.reference_versions(ledger)), None)

    @property
    def bounds_total_loss(self) -> bool:
        """Whether the policy limits the sum of small losses over many promotions.

        A reference does, and so do the promotion modes other than `always`.
        """
        return self.reference is not None or self.promote not in (None, "always")

    def fields(self) -> dict[str, Any]:
        """Return the policy as a JSON object."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class PromotionRule:
    """What an automatic promotion needs, by a run's `registry.promote` and the name's policy.

    is_never: nothing is promoted automatically.
    asks_person: a person has to approve.
    must_be_better: the held-out loss has to be significantly lower.
    """

    is_never: bool
    asks_person: bool
    must_be_better: bool

    @classmethod
    def of(cls, promote: str, policy: RegistryPolicy | None) -> PromotionRule:
        """Combine `registry.promote` and policy: `never` wins, `approve` and `better` add up."""
        modes = (promote, None if policy is None else policy.promote)
        return cls("never" in modes, "approve" in modes, "better" in modes)


def read_policy(registry: Path, name: str) -> RegistryPolicy | None:
    """Read the policy of an adapter name; None without a policy or without such a name."""
    check_name(name)
    if not name_exists(registry, name):
        return None
    with reading(registry, name) as (folder, ledger):
        return policy_of(folder, ledger)


def policy_of(folder: Path, ledger: Ledger) -> RegistryPolicy | None:
    """Parse the policy in the history of an adapter name's folder; None without a policy.

    Raises DamagedError for a policy that cannot be read.
    """
    recorded = ledger.policy()
    return None if recorded is None else _parse_policy(recorded, folder / LEDGER_NAME)


def read_reference(registry: Path, name: str) -> str | None:
    """Return the version that the policy's `reference` means today; None without a reference."""
    with reading(registry, name) as (folder, ledger):
        policy = policy_of(folder, ledger)
    return None if policy is None else policy.find_reference(ledger)


def set_policy(registry: Path, name: str, *, by: str, changes: Mapping[str, Any]) -> RegistryPolicy:
    """Change keys of an adapter name's policy and record who did it; return the new policy.

    changes: some fields of RegistryPolicy. The name is created if it does not exist.

    Raises ConfigError for an invalid value, for unusable suites, and for `approve` without the room
    approval.
    """
    if changes.get("promote") == "approve":
        seams.require("approval", APPROVE_KEY)
    with writing_folder(create_name_folder(registry, name)) as locked:
        before = locked.ledger.policy()
        reference = changes.get("reference")
        if isinstance(reference, str) and not reference.startswith(NIGHTS_PREFIX):
            resolved = resolve_version(locked.path, reference, locked.ledger)
            changes = {**changes, "reference": resolved}
        earlier = policy_of(locked.path, locked.ledger) or RegistryPolicy()
        policy = _check_policy(earlier.fields() | dict(changes))
        if before != policy.fields():
            locked.record("policy", locked.champion, by, before=before, after=policy.fields())
    return policy


def apply_policy(config: FineTuneConfig) -> tuple[FineTuneConfig, list[str]]:
    """Apply the policy of a run's registry to its configuration.

    Returns the configuration, and a sentence for each key that the policy made stricter. Without a
    registry or a policy the configuration is returned unchanged.
    """
    section = config.registry
    if section.path is None or section.name is None:
        return config, []
    policy = read_policy(Path(section.path), section.name)
    sentences = describe_tightening(config, policy)
    if section.promote == "always" and (policy is None or not policy.bounds_total_loss):
        sentences.append(f"{section.name}: {NO_REFERENCE}")
    return tighten(config, policy), sentences


def tighten(config: FineTuneConfig, policy: RegistryPolicy | None) -> FineTuneConfig:
    """Return a run's configuration with the policy's bounds and suites where they are stricter.

    The policy of a name in the registry holds for all runs that register there; None changes
    nothing. A suite is a file of questions; one of the policy replaces the run's of the same name.

    Under a policy differences are judged beyond noise (`gate.noise: paired`). `registry.promote`
    stays as it is: `PromotionRule` combines it with the policy.
    """
    if policy is None:
        return config
    gate = config.gate
    changes: dict[str, object] = {}
    bound = policy.max_val_loss_increase
    if bound is not None and bound < gate.max_val_loss_increase:
        changes["max_val_loss_increase"] = bound
    if gate.noise != "paired":
        changes["noise"] = "paired"
    if policy.tasks:
        named = {task.name for task in policy.tasks}
        other_tasks = tuple(task for task in gate.tasks if task.name not in named)
        changes["tasks"] = (*other_tasks, *policy.tasks)
    if not changes:
        return config
    return config.model_copy(update={"gate": gate.model_copy(update=changes)})


def describe_tightening(config: FineTuneConfig, policy: RegistryPolicy | None) -> list[str]:
    """Return a sentence for each key in which the policy is stricter than a run's configuration.

    The policy of a name in the registry holds for all runs that register there; None gives none.
    """
    if policy is None:
        return []
    gate, stricter = config.gate, tighten(config, policy).gate
    sentences = []
    if stricter.max_val_loss_increase != gate.max_val_loss_increase:
        sentences.append(
            f"gate.max_val_loss_increase is {stricter.max_val_loss_increase:g}, not "
            f"{gate.max_val_loss_increase:g}"
        )
    if stricter.noise != gate.noise:
        sentences.append(f"gate.noise is {stricter.noise}, not {gate.noise}")
    asked = {task.name: task for task in gate.tasks}
    for task in policy.tasks:
        if asked.get(task.name) != task:
            replaced = ", in place of this run's" if task.name in asked else ""
            sentences.append(f"the eval set {task.name} is asked{replaced}")
    promote = config.registry.promote
    if PromotionRule.of(promote, policy) != PromotionRule.of(promote, None):
        sentences.append(f"promote: {policy.promote} counts beside this run's {promote}")
    return [f"the policy of {config.registry.name}: {sentence}" for sentence in sentences]


def find_looser_bounds(
    policy: RegistryPolicy | None, thresholds: Mapping[str, Any] | None
) -> list[str]:
    """Return the names of a verdict's bounds that are less strict than the policy's.

    A suite of the policy must have been asked exactly as the policy gives it.

    thresholds: the values of section `gate` in the verdict.
    """
    if policy is None:
        return []
    judged = thresholds or {}
    looser = [] if judged.get("noise") == "paired" else ["gate.noise"]
    bound, judged_bound = policy.max_val_loss_increase, judged.get("max_val_loss_increase")
    if bound is not None and not (isinstance(judged_bound, int | float) and judged_bound <= bound):
        looser.append("gate.max_val_loss_increase")
    asked = {task.get("name"): task for task in judged.get("tasks") or []}
    for task in policy.tasks:
        if asked.get(task.name) != task.model_dump(mode="json"):
            looser.append(f"the eval set {task.name}")
    return looser


def _parse_policy(fields: Mapping[str, Any], path: Path) -> RegistryPolicy:
    """Parse the policy in a history line; DamagedError if it has another form."""
    kept = {key: value for key, value in fields.items() if key != "canary"}  # 0.2.0 wrote it
    try:
        return RegistryPolicy.model_validate(kept)
    except ValidationError as error:
        problem = describe_first_problem(error)
        raise DamagedError(
            f"{path} holds a policy that cannot be read: {problem}. Restore it from a backup."
        ) from error


def _check_policy(fields: Mapping[str, Any]) -> RegistryPolicy:
    """Validate a policy that a person sets; ConfigError if a run could not follow it."""
    try:
        policy = RegistryPolicy.model_validate(fields)
        GateSection.model_validate({"tasks": policy.fields()["tasks"]})
    except ValidationError as error:
        raise ConfigError(f"policy: {describe_first_problem(error)}.") from error
    return policy
