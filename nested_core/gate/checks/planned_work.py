"""What a gate will compute with the model, as each check declares it: by this its time is forecast.

Nothing is measured here. Work is counted as if no answer were in the cache of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.models.chat_template import Tokenizer
from nested_core.records.dataset import held_out_split, read_dataset_record
from nested_core.records.start import read_start
from nested_core.registry.folders import name_exists
from nested_core.registry.policy import read_reference
from nested_core.registry.queries import read_champion
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import open_regular


@dataclass(frozen=True, kw_only=True)
class GateWork:
    """What one check computes.

    rows: rows of data through the model, each counted once for every adapter.
    prompt_tokens: tokens of prompts that are read.
    tokens: tokens of answers that are generated one after the other, `answers` answers at once.
    """

    rows: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    answers: int = 0


@dataclass(frozen=True)
class RunToJudge:
    """A run that was validated and loaded, with the tokenizer of its base."""

    config: FineTuneConfig
    run: RunDirectory
    tokenizer: Tokenizer

    def count_rows(self, rows: int, adapters: int, *, is_base_among: bool = False) -> int:
        """Return the most rows that one pass over `rows` computes with so many adapters.

        A room's loss may compare each with the base, which it computes unless it is among them.
        """
        return rows * (adapters + (self.config.training.loss is not None and not is_base_among))

    @cached_property
    def held_out_rows(self) -> int:
        """The examples that the gate measures losses on."""
        choice, splits = self.config.gate.held_out, read_dataset_record(self.run.dataset).splits
        if (split := held_out_split(choice, splits)) is not None:
            return splits[split].rows
        return 0 if choice in SPLITS_BY_HELD_OUT_CHOICE else count_lines(Path(choice))

    @cached_property
    def goes_on(self) -> bool:
        """Whether the run begins from an adapter that was trained before."""
        start = read_start(self.config, self.run)
        if start is None:
            return self.config.resume_adapter_file is not None
        return start.champion is not None and start.choice.policy == "continue"

    @cached_property
    def champion(self) -> str | None:
        """The champion that the run is compared with; None without one, or without a registry."""
        location = self.config.registry.location
        return None if location is None or not name_exists(*location) else read_champion(*location)

    @cached_property
    def rivals(self) -> tuple[str | None, str | None]:
        """The champion, and the policy's reference version, where they are not the run's start."""
        reference = None
        if self.champion is not None and (location := self.config.registry.location) is not None:
            reference = read_reference(*location)
        reference = None if reference == self.champion else reference
        is_start = self.goes_on and self.config.continual.start is not None
        return None if is_start else self.champion, reference

    def ask(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> GateWork:
        """The work of prompts, as token ids, to models whose answers have so many tokens each."""
        read = sum(map(len, prompts)) * len(tokens)
        return GateWork(prompt_tokens=read, tokens=sum(tokens), answers=len(prompts))


def count_lines(path: Path) -> int:
    """The lines of a file; 0 for a file that is not there, which its reader reports."""
    if not path.is_file():
        return 0
    with open_regular(path, follow_links=True) as (lines, _):
        return sum(1 for _ in lines)
