"""`gate`: the bounds that the gate judges by. Nothing here lets an adapter past the gate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt

from nested_core.config.section import Section, key

Share = Annotated[float, Field(ge=0, le=1)]
Score = Literal["exact", "contains", "regex", "number", "json", "choice", "python"]
TASK_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
# The splits that a value of held_out stands for, the first one that is there; others are files.
SPLITS_BY_HELD_OUT_CHOICE = {"auto": ("test", "valid"), "test": ("test",), "valid": ("valid",)}
SCORER_FUNCTION_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


def _text_as_list(value: Any) -> Any:
    """One text is a list of one."""
    return [value] if isinstance(value, str) else value


Stops = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_text_as_list)]


class TaskSection(Section):
    """One suite of questions that the adapter has to answer, and the bounds of its score."""

    name: str = key(..., "what messages and gate.json call it", pattern=TASK_NAME_PATTERN)
    file: str = key(..., "JSON Lines, a question a line with the answer expected", path="local")
    score: Score = key(..., "how an answer is compared with the expected one")
    function: str | None = key(None, "for python, module:function", pattern=SCORER_FUNCTION_PATTERN)
    min: Share | None = key(None, "the least share of right answers")
    max_drop: Share | None = key(0.0, "the most that training may lose; null is any")
    min_gain: Share | None = key(None, "the least that training must win")
    max_tokens: PositiveInt = key(64, "of an answer", lt=2**20)
    stop: Stops = key((), "texts at which an answer ends")
    temperature: NonNegativeFloat = key(0.0, "0 takes the likeliest token")
    seed: int = key(0, "of the draws where the temperature is above 0", ge=0, lt=2**32)
    tolerance: NonNegativeFloat = key(0.0, "for number, where a question has none of its own")
    canary: bool = key(
        False, "its answers are recorded, for a server to compare its own with after a swap"
    )

    def problems(self) -> Iterator[str]:
        """A function is what scores python, and nothing else."""
        if (self.function is not None) != (self.score == "python"):
            yield "score: python needs a function, module:function; no other score has one"
        if self.tolerance and self.score != "number":
            yield f"tolerance: for score: number; {self.score} compares no numbers"


class GateSection(Section):
    """The bounds that the gate judges by; they are recorded in gate.json."""

    held_out: str = key(
        "auto",
        "what is judged on: valid, test, a JSON Lines file, or auto, which is test before valid",
        path="local_or_split",
        min_length=1,
    )
    max_val_loss_increase: NonNegativeFloat = key(
        0.02,
        "relative, at least 0.01 nats: the margin within which the loss has to be shown to stay; "
        "0.0: none",
    )
    max_harmed_share: Share = key(
        0.01, "of examples that lost far more than a nat a token, while none or few won as much"
    )
    samples: Literal["warn", "fail"] = key(
        "warn",
        "where training broke most answers to sample prompts (empty, repeated, endless): warn "
        "keeps it from being promoted by itself, fail rejects it",
    )
    min_relative_change: NonNegativeFloat = key(
        0.0, "the least share of its norm that some tensor must have moved"
    )
    max_skipped_share: Share = key(0.01, "of a tier's updates, skipped for non-finite gradients")
    general_data: str | None = key(
        None, "JSON Lines of text that the adapter must not forget", path="local"
    )
    max_general_loss_increase: NonNegativeFloat | None = key(None, "relative, on general_data")
    check_fused: bool = key(False, "judge the adapter fused into the base model too")
    max_kl: NonNegativeFloat | None = key(
        None, "nats a held-out token that predictions may move from the initial adapter's"
    )
    drift: bool = key(False, "record how far predictions moved from the base model's, too")
    tasks: tuple[TaskSection, ...] = key((), "suites of questions that the adapter has to answer")
    allow_python_scorers: bool = key(
        False, "let tasks run Python functions with your rights; never a flow's parameter"
    )
    noise: Literal["paired", "none"] = key(
        "paired",
        "paired: a loss or score counts as worse where the 95 % interval of the paired differences "
        "says so and the margin may be passed; none: the bound alone, on the mean",
    )

    def problems(self) -> Iterator[str]:
        """What belongs together: the general text and its bound, Python scorers and their key."""
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
