"""The gate's losses in several processes: as many as train, on this machine, each on its own GPU.

A batch is computed as a whole, by whichever process, so every figure is that of one process to the
bit. The helpers are started at the first comparison of many batches; until they have loaded their
base, this process goes on alone. With a hostfile it judges alone.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core import backend
from nested_core.config.schema import FineTuneConfig
from nested_core.data.batches import BatchRows
from nested_core.errors import JUDGE_AGAIN, ChildFailed, NestedTuneError
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.measure.losses.prediction_comparison import ExamplePredictions
from nested_core.models.session import Session
from nested_core.process.child import Child
from nested_core.rooms.ranks.rank_world import seconds_to_wait
from nested_core.storage.safetensors_files import save_arrays
from nested_core.storage.user_tmpdir import environment_with_user_tmpdir
from nested_core.training.loss.loss_interface import MicroBatch

Compare = Callable[[Sequence[MicroBatch]], list[ExamplePredictions]]
HELPER: str | Path = "nested_core.rooms.ranks.gate_helper:answer"
MIN_BATCHES = 64  # fewer are computed before a helper has imported mlx
SECONDS_OF_A_LOOK = 0.0  # whether a helper has loaded its base
BATCHES_AT_ONCE = 8  # that a helper is sent, as numbers in a line of JSON


@contextmanager
def helping_to_judge(config: FineTuneConfig, session: Session) -> Iterator[None]:
    """Have `training.processes` compute the losses of the session's gate within the block."""
    session.helpers = helpers = GateHelpers(config.training.processes)
    try:
        yield
    finally:
        session.helpers = None
        helpers.end()


class GateHelpers:
    """The other processes, which are started when they are needed: `BatchHelpers`."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._children: list[Child] = []

    def compare(
        self,
        base: LoadedBase,
        adapters: Sequence[Mapping[str, mx.array]],
        batches: Sequence[BatchRows],
        arrays: Callable[[BatchRows], MicroBatch],
    ) -> Iterator[ExamplePredictions]:
        """Yield the predictions of the batches, in their order."""
        if len(batches) < MIN_BATCHES:
            yield from base.compare_batches(adapters, map(arrays, batches))
            return
        with TemporaryDirectory() as folder:
            files = [str(Path(folder, f"{place}.safetensors")) for place in range(len(adapters))]
            for file, tensors in zip(files, adapters, strict=True):
                save_arrays(Path(file), tensors)
            self._start()
            for child in self._children:
                child.send({"config": base.config.model_dump(mode="json"), "adapters": files})
            compare, left = comparing(base, adapters), iter(batches)
            while not all(child.has_answer(SECONDS_OF_A_LOOK) for child in self._children):
                if not (alone := [*islice(left, 1)]):
                    return self.end()  # nothing was left for them: they are not waited for
                yield from compare([*map(arrays, alone)])
            with _naming_helper():
                yield from self._share(left, arrays, compare, base.config.training.hang_timeout)
        return None

    def _share(
        self,
        batches: Iterator[BatchRows],
        arrays: Callable[[BatchRows], MicroBatch],
        compare: Compare,
        timeout: float | str | None,
    ) -> Iterator[ExamplePredictions]:
        """Yield the predictions of batches that all processes share; ChildFailed if one hangs.

        timeout: `training.hang_timeout`, for a helper to read what it is sent, and to answer.
        """
        for child in self._children:
            child.receive()  # that it has loaded the base
        longest = 0.0
        while block := [*islice(batches, self._processes * BATCHES_AT_ONCE)]:
            seconds = None if timeout is None else seconds_to_wait(timeout, longest)
            for rank, child in enumerate(self._children, 1):
                own = block[rank :: self._processes]
                child.send([[array.tolist() for array in arrays(one)] for one in own], seconds)
            began = time.monotonic()
            parts = [compare([*map(arrays, block[:: self._processes])])]
            longest = max(longest, time.monotonic() - began)
            seconds = None if timeout is None else seconds_to_wait(timeout, longest)
            parts += [[*map(_read, child.receive(seconds))] for child in self._children]
            for place in range(len(block)):
                yield parts[place % self._processes][place // self._processes]

    def _start(self) -> None:
        """Start the helpers, each with a GPU of its own on CUDA, unless they run."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        for rank in range(len(self._children) + 1, self._processes):
            environment = environment_with_user_tmpdir()
            if backend.computes_on_cuda():
                device = str(rank) if visible is None else visible.split(",")[rank]
                environment |= {"CUDA_VISIBLE_DEVICES": device}
            self._children.append(Child(HELPER, environment=environment))

    def end(self) -> None:
        """End the helpers."""
        while self._children:
            self._children.pop().end()


def comparing(base: LoadedBase, adapters: Sequence[Mapping[str, mx.array]]) -> Compare:
    """Return the function that compares the adapters on batches, with what MLX compiled before."""
    pending: deque[MicroBatch] = deque()
    predictions = base.compare_batches(adapters, iter(pending.popleft, None))

    def compare(batches: Sequence[MicroBatch]) -> list[ExamplePredictions]:
        pending.extend(batches)
        return [*islice(predictions, len(batches))]

    return compare


@contextmanager
def _naming_helper() -> Iterator[None]:
    """Raise NestedTuneError where a helper ends, or does not read or answer in time: no verdict."""
    try:
        yield
    except ChildFailed as error:
        raise NestedTuneError(
            f"A process that computed losses of the gate beside this one failed: {error}.",
            advice=JUDGE_AGAIN,
        ) from error


def _read(columns: dict[str, Any]) -> ExamplePredictions:
    """Return the predictions of a batch, of which a helper sent shapes and numbers by name."""
    arrays = {name: np.reshape(numbers, shape) for name, (shape, numbers) in columns.items()}
    return ExamplePredictions(**arrays)
