"""Losses that are computed from the files on disk, on fixed examples, with a model loaded anew."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nested_core.config.data import DataPolicy
from nested_core.config.schema import FineTuneConfig
from nested_core.data.dataset import load_dataset, load_run_data
from nested_core.data.rules.dataset_report import DatasetReport
from nested_core.data.settings import DataSettings
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError, DatasetError
from nested_core.gate.held import HeldBase
from nested_core.gate.verdict import GeneralLoss, Validation
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import regular_sha256
from nested_core.storage.strict_json import finite_or_none

LISTED_PROBLEMS = 3


def measure_losses(held: HeldBase, run: RunDirectory) -> Validation | None:
    """Mean loss with the initial and with the trained adapter, or None without held-out data.

    The examples are test.jsonl where there is one, else the validation set, which the best
    checkpoint was chosen on: `selected_on_same_data` says so.
    """
    name, split = _held_out(held.config, run, ("test", "valid"))
    if split is None:
        return None
    before, after = map(finite_or_none, held.losses((run.initial, run.adapter), split))
    return Validation(before, after, selected_on_same_data=name == "valid")


def measure_test(config: FineTuneConfig, run: RunDirectory) -> float:
    """Mean loss of the run's adapter on `test_batches` batches of test.jsonl, as `test` asks for.

    Raises DatasetError where there is no test set.
    """
    _, split = _held_out(config, run, ("test",))
    if split is None:
        raise DatasetError(f"test: {config.data} has no test.jsonl, or it is empty.")
    return HeldBase.load(config).losses((run.adapter,), split, config.test_batches)[0]


def measure_general(held: HeldBase, run: RunDirectory) -> GeneralLoss | None:
    """Mean loss with either adapter on `gate.general_data`; None where none is configured.

    Raises ConfigError where there is no such file, DatasetError where it is not sound.
    """
    if held.config.gate.general_data is None:
        return None
    path = Path(held.config.gate.general_data).expanduser()
    split = _read_general(held.config, path)
    before, after = map(finite_or_none, held.losses((run.initial, run.adapter), split))
    return GeneralLoss(before, after, str(path), regular_sha256(path))


def refuse_other_data(run: RunDirectory, report: DatasetReport) -> None:
    """Raise DatasetError where the data is not what dataset.json says was validated."""
    validated = json.loads(run.dataset.read_bytes())["digest"]
    if report.digest != validated:
        raise DatasetError(
            f"The data in {report.folder} has changed since it was validated for {run.path}: its "
            f"digest is {report.digest[:12]}, dataset.json says {validated[:12]}. Start a new run."
        )


def _held_out(
    config: FineTuneConfig, run: RunDirectory, names: Sequence[str]
) -> tuple[str, TokenizedSplit | None]:
    """The first of the splits that has examples."""
    report, splits = load_run_data(config)
    refuse_other_data(run, report)
    filled = (name for name in names if name in splits and len(splits[name]))
    name = next(filled, names[0])
    return name, splits.get(name)


def _read_general(config: FineTuneConfig, path: Path) -> TokenizedSplit:
    """One file, read and judged as a test set of its own; every token of it counts."""
    if not path.is_file():
        raise ConfigError(f"gate.general_data: {path} is not a file; expected a .jsonl file.")
    with tempfile.TemporaryDirectory(prefix="nested-tune-general-") as folder:
        Path(folder, "test.jsonl").symlink_to(path.resolve())
        settings = replace(
            DataSettings.from_config(config),
            data=folder,
            hf_dataset=(),
            mask_prompt=False,
            supervise="last",
            policy=DataPolicy(),
        )
        report, splits = load_dataset(settings, TokenizerSource.from_config(config))
    own = [each for each in report.findings if each.file == "test.jsonl"]
    problems = [
        f"line {each.line or 1}: {each.message}" for each in own if each.severity == "error"
    ]
    if problems or not len(splits.get("test", ())):
        listed = "\n".join(f"  {problem}" for problem in problems[:LISTED_PROBLEMS])
        raise DatasetError(f"gate.general_data: {path} holds no sound text to judge by.\n{listed}")
    return splits["test"]
