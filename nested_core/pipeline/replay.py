"""What a run replays: read from earlier data before training, and written to the run directory.

A run that was set up reads replay.json and replay.jsonl alone: it goes on without its sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.data.data_settings import DataSettings
from nested_core.data.lines.example_parsing import Example, parse_line, strip_line
from nested_core.data.lines.json_decoding import LineProblem
from nested_core.data.replayed_examples import EarlierData, NewData, choose_replayed_examples
from nested_core.data.sources.split_files import open_splits
from nested_core.errors import ConfigError, DatasetError
from nested_core.records.replay import ReplayRecord, read_replay
from nested_core.storage.atomic import remove_file, write_bytes, write_json
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

Splits = dict[str, list[Example]]


def prepare_replay(config: FineTuneConfig, run: RunDirectory) -> None:
    """Choose what the run replays, and write it, unless the run was set up before.

    Raises ConfigError where a source is missing or has changed, under `replay.missing: error`.
    """
    if run.initial.exists() and run.tiers.exists():
        return
    for earlier in (run.replay, run.replayed_rows):
        remove_file(earlier)
    replay = config.continual.replay
    if not replay.fraction:
        return
    new = NewData()
    splits = _read_new_data(config)
    for split, examples in splits.items():
        for example in examples:
            new.add(example, is_held_out=split != "train")
    batches = config.iters
    if config.training.epochs is not None:
        rows = config.training.epochs * len(splits.get("train", ()))
        batches = ceil(rows / (config.batch_size * (1 - replay.fraction))) + 1
    chosen = choose_replayed_examples(
        new,
        list(_read_files(config)),
        draws=int(batches * config.batch_size * replay.fraction),
        weighting=replay.weighting,
        max_generations=replay.max_generations,
        seed=config.seed,
    )
    content = b"".join(chosen.lines)
    record = ReplayRecord(
        fraction=replay.fraction,
        weighting=replay.weighting,
        start=None,
        sources=chosen.sources,
        rows_sha256=sha256(content).hexdigest(),
        dropped=tuple(content.hex() for content in chosen.dropped),
    )
    if replay.missing == "error" and (problems := record.problems()):
        raise ConfigError(
            "continual.replay: not all earlier data is there, and replay.missing is error:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\nBring it back, name other sources, or let missing be warn: the run goes on "
            "with the rest then."
        )
    write_bytes(run.replayed_rows, content)
    write_json(run.replay, record.model_dump(mode="json"))


def describe_replay(config: FineTuneConfig, run: RunDirectory) -> list[str]:
    """Sentences on what the run replays; none without replay."""
    return list(read_replay(run.replay).describe()) if config.continual.replay.fraction else []


def _read_new_data(config: FineTuneConfig) -> Splits:
    """The examples of the run's own data, and of the file that the gate judges by."""
    settings = DataSettings.from_config(config)
    splits = _read_examples(settings)
    held_out = config.gate.held_out
    if held_out not in SPLITS_BY_HELD_OUT_CHOICE:
        others = replace(settings, data=held_out, hf_dataset=(), data_format="auto")
        splits[held_out] = [e for own in _read_examples(others).values() for e in own]
    return splits


def _read_files(config: FineTuneConfig) -> Iterator[EarlierData]:
    """The data sets that `replay.sources` names, the newest first."""
    settings = replace(DataSettings.from_config(config), hf_dataset=())
    for name in config.continual.replay.sources:
        try:
            splits = _read_examples(replace(settings, data=name, data_format="auto"))
        except (ConfigError, DatasetError, FileNotFoundError, PermissionError) as error:
            yield EarlierData(
                None, name, problem=f"it cannot be read, and is not replayed: {error}"
            )
            continue
        held_out = [e for split in ("valid", "test") for e in splits.get(split, ())]
        problem = None if splits.get("train") else "there is no training example in it"
        yield EarlierData(None, name, splits.get("train", ()), held_out, problem)


def _read_examples(settings: DataSettings) -> Splits:
    """The examples of each split; lines that hold none are passed over."""
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        files = open_splits(settings, Path(spool))
        return {split: list(_parse_file(file.path, settings)) for split, file in files.items()}


def _parse_file(path: Path, settings: DataSettings) -> Iterator[Example]:
    with open_regular(path, UNBOUNDED, follow_links=True) as (lines, _):
        for number, line in enumerate(lines, 1):
            if body := strip_line(line, is_first=number == 1):
                try:
                    yield parse_line(body, settings.field_names)
                except LineProblem:  # the validation of that data says what is wrong with it
                    continue
