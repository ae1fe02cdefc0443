"""The suites of `gate.tasks`: read before training begins, and the same ones when it is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nested_core.config.sections import GateSection, TaskSection
from nested_core.errors import ConfigError, DamagedError
from nested_core.gate.answers.scorers import ScoringMethod
from nested_core.gate.answers.suite_answers import EncodedSuite, Suite
from nested_core.models.base_model import context_length
from nested_core.models.generation import Sampling
from nested_core.storage.atomic import write_json
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import file_type, read_json

MAX_RECORD_BYTES = 1024 * 1024


@dataclass(frozen=True)
class SuiteRecord:
    """A suite as the run found it, in suites.json under its name."""

    file: str
    sha256: str
    questions: int


_RECORDS_VALIDATOR = TypeAdapter(dict[str, SuiteRecord])


def read_suites(gate: GateSection) -> tuple[Suite, ...]:
    """Every suite of `gate.tasks`, checked line by line; what scores it is compiled or imported.

    Raises ConfigError if a file is missing, DatasetError if one has bad lines or its function
    cannot be imported.
    """
    return tuple(_read_suite(task) for task in gate.tasks)


def _read_suite(task: TaskSection) -> Suite:
    method = ScoringMethod(Path(task.file), task.score, task.function)
    sampling = Sampling(task.max_tokens, task.stop, task.temperature, task.seed)
    suite = Suite.read(task.name, method, sampling)
    questions = [
        question if "tolerance" in question.fields else replace(question, tolerance=task.tolerance)
        for question in suite.questions
    ]
    return replace(suite, questions=tuple(questions))


def record_or_compare_suites(run: RunDirectory, suites: Sequence[Suite]) -> None:
    """Write suites.json, or compare with it: a run is judged by the questions it began with.

    Raises ConfigError if a suite of the same name has another content since training began.
    """
    if not suites:
        return
    before = _read_suite_records(run.suites)
    now = {
        suite.name: SuiteRecord(str(suite.method.place), suite.digest, len(suite.questions))
        for suite in suites
    }
    changed = [
        name
        for name, record in now.items()
        if name in before and before[name].sha256 != record.sha256
    ]
    if changed and run.tiers.exists():
        raise ConfigError(
            f"gate.tasks: {' and '.join(now[name].file for name in changed)} changed since "
            f"{run.path} began: its digest is not the one in {run.suites.name}. Bring back what "
            f"was there, or start a new run."
        )
    records = before | now
    write_json(run.suites, {name: asdict(record) for name, record in records.items()})


def _read_suite_records(path: Path) -> dict[str, SuiteRecord]:
    if file_type(path) == "missing":
        return {}
    try:
        return _RECORDS_VALIDATOR.validate_python(read_json(path, MAX_RECORD_BYTES))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise DamagedError(f"{path} does not name the suites of this run: {reason}.") from error


def encode_suites(suites: Sequence[Suite], tokenizer: Any, base: Path) -> tuple[EncodedSuite, ...]:
    """Each suite in token ids of the base model in this folder.

    Raises DatasetError, with the questions, for prompts that are longer than the model's context
    or that its chat template does not take.
    """
    context = context_length(base)
    return tuple(EncodedSuite.encode(suite, tokenizer, context) for suite in suites)
