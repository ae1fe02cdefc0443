"""Checks before the first step of what would fail a run at its end: registry, folders, disk.

Everything is refused here before hours of training, and before the run folder exists.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.data.earlier_examples import find_earlier_examples
from nested_core.errors import ConfigError
from nested_core.measure.answers.answer_cache import answer_cache
from nested_core.measure.answers.suite_answers import read_suites
from nested_core.models.base_model import require_folder_or_hub_name
from nested_core.pipeline.processes import count_processes, load_services, refuse_mlx_launch
from nested_core.records.dataset import read_dataset_record
from nested_core.registry.mirroring import RegistryMirror
from nested_core.registry.policy import APPROVE_KEY
from nested_core.registry.promotion_policy import effective_rule, registry_location
from nested_core.registry.registration import require_usable_registry
from nested_core.storage.adapter import WEIGHTS_NAME, make_adapter_folder
from nested_core.storage.atomic import require_writable_place
from nested_core.storage.checkpoint_verification import list_checkpoints
from nested_core.storage.output_places import require_adapter_place, require_free_place
from nested_core.storage.run_directory import RUN_DIR_KEY, RunDirectory
from nested_core.storage.safetensors_files import BYTES_PER_ELEMENT, read_header
from nested_core.storage.untrusted_files import open_regular
from nested_core.text.value_format import format_bytes

FLOAT32_BYTES = 4
# Float32 values an optimizer of mlx keeps for each parameter; two for those not listed.
MOMENTS_BY_OPTIMIZER = {"adafactor": 0, "sgd": 1, "lion": 1, "muon": 1, "adagrad": 1, "rmsprop": 1}
DEFAULT_MOMENTS = 2


@dataclass(frozen=True)
class StartRules:
    """What a room says of a configuration before a run of it starts.

    warn: returns warnings, which keep no run from starting.
    require_usable_rate: raises ConfigError if a run would go on from the champion at a learning
        rate that is too high.
    """

    warn: Callable[[FineTuneConfig], list[str]]
    require_usable_rate: Callable[[FineTuneConfig], None]


def check_before_start(config: FineTuneConfig, run: RunDirectory) -> None:
    """Check everything that a run needs at its end: output paths, rooms, registry, suites, disk.

    Rooms are optional parts of the program, which an installation may have deleted; a key of the
    configuration that needs a missing one must have its default value.

    It creates nothing but the folder of adapter_path. Raises ConfigError for what cannot be used,
    DamagedError for a damaged registry, DatasetError for suites with bad lines.
    """
    refuse_mlx_launch()
    for key, room in seams.list_deleted_keys().items():
        section, _, name = key.rpartition(".")
        given = getattr(config, section)
        if getattr(given, name) != type(given).model_fields[name].get_default():
            seams.require(room, key)
    adapter_folder = require_output_places(config, run)
    require_folder_or_hub_name(config.model)
    count_processes(config)  # raises for an unusable hostfile
    load_services(config)  # raises for one that is not installed
    if config.registry.path is not None:
        require_usable_registry(*registry_location(config.registry))
        if config.registry.mirror is not None:
            mirror = seams.load_only(RegistryMirror, "registry.mirror")
            mirror.require_usable(config.registry.mirror)
        if effective_rule(config.registry).asks_person:
            seams.require("approval", APPROVE_KEY)
    if read_suites(config.gate):
        answer_cache().require_usable()
    require_writable_place(run.path, "a run directory", "--run-dir or run_dir")
    if adapter_folder is not None:
        make_adapter_folder(adapter_folder)


def require_output_places(config: FineTuneConfig, run: RunDirectory) -> Path | None:
    """Return the resolved folder of adapter_path; None without that key.

    Raises ConfigError if that folder or the run directory lies in a registry, a run or a model's
    folder.
    """
    registry = config.registry.path
    require_free_place(run.path, RUN_DIR_KEY, own_run=run.path, registry=registry)
    if config.adapter_path is None:
        return None
    return require_adapter_place(config.adapter_path, own_run=run.path, registry=registry)


def require_room_for_checkpoints(config: FineTuneConfig, run: RunDirectory) -> None:
    """Raise ConfigError if the disk has no room for the checkpoints that a run will keep.

    The adapter that is offered in the end, and its copies for `adapter_path`, need room as well.
    Their size is estimated from the initial adapter; existing checkpoints are counted.
    """
    size = estimate_checkpoint_bytes(config, run)
    iterations = estimate_iterations(config, run)
    every = config.intervals(iterations).save
    saves = config.training.keep_checkpoints if every is None else ceil(iterations / every)
    # The best checkpoint is kept beside the last ones, twice where a flush may void it
    bests = 2 if config.nested.slow_gradients == "accumulate" else 1
    most = min(saves + 1, config.training.keep_checkpoints + bests + 1)  # and one in writing
    missing = max(0, most - len(list_checkpoints(run.checkpoints)))
    weights = (run.initial / WEIGHTS_NAME).stat().st_size
    needed = missing * size + weights  # the adapter that is offered in the end
    if config.adapter_path is not None:
        needed += saves * weights
    free = shutil.disk_usage(run.path).free
    if free >= needed:
        return
    raise ConfigError(
        f"{run.path} has no room for its checkpoints: up to {most} are kept at a time, of about "
        f"{format_bytes(size)} each, which with the adapter is {format_bytes(needed)} more, and "
        f"{format_bytes(free)} are free on its disk. Make room, keep fewer with "
        f"training.keep_checkpoints, or give a run directory on another disk."
    )


def estimate_iterations(config: FineTuneConfig, run: RunDirectory) -> int:
    """Estimate the micro-batches of a validated run; with epochs, from its number of examples."""
    examples = read_dataset_record(run.dataset).splits["train"].rows
    if earlier := find_earlier_examples(config, run):
        return earlier.estimate_iterations(examples)
    if config.training.epochs is None:
        return config.iters
    return ceil(config.training.epochs * ceil(examples / config.batch_size))


def estimate_checkpoint_bytes(config: FineTuneConfig, run: RunDirectory) -> int:
    """Estimate a checkpoint's size: adapter, float32 master copies and the optimizer's moments."""
    weights = run.initial / WEIGHTS_NAME
    with open_regular(weights) as (file, size):
        tensors = read_header(file, size, weights).values()
    counts = [
        ((at.end - at.begin) // BYTES_PER_ELEMENT[at.dtype], BYTES_PER_ELEMENT[at.dtype])
        for at in tensors
    ]
    count = sum(number for number, _ in counts)
    masters = sum(number for number, width in counts if width < FLOAT32_BYTES)
    moments = MOMENTS_BY_OPTIMIZER.get(config.optimizer, DEFAULT_MOMENTS)
    if config.nested.slow_gradients == "accumulate":
        moments += 1
    return size + FLOAT32_BYTES * (masters + moments * count)
