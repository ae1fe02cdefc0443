"""What one fine-tune keeps in memory between its steps; the gate still judges the files on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import mlx.core as mx

from nested_core.models.kept_base import (
    BaseWithAdapter,
    checksum_frozen_tensors,
    describe_base,
    load_base_with_adapter,
)
from nested_core.process.child import Child

if TYPE_CHECKING:
    from nested_core.config.schema import FineTuneConfig
    from nested_core.records.judged_run import JudgedRun
    from nested_core.records.plan import TimePlan


class Session:
    """The base model that was loaded last, and processes that were started before they are needed.

    `finetune` creates one and passes it to each step; a step that is called alone creates its own.
    It is for one thread, like MLX's arrays.

    Attributes:
        base: the base that is kept; None before one is loaded.
        await_kernels: waits for kernels that are compiled in advance, unless its argument returns
            that a stop is requested; None if no kernels are compiled.
        judged: the run that was judged last, for its registration; None before.
        time_plan: how the run's minutes were planned; None if no minutes are configured.
        after_step: called with the trainer after each step, by which these minutes are kept.
    """

    def __init__(self) -> None:
        """Create an empty session."""
        self.base: BaseWithAdapter | None = None
        self.await_kernels: Callable[[Callable[[], bool]], None] | None = None
        self.judged: JudgedRun | None = None
        self.time_plan: TimePlan | None = None
        self.after_step: Callable[[Any], None] | None = None
        self._proof_process: Child | None = None

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the base, and end the waiting proof process."""
        self.release_base()
        if (process := self.take_proof_process()) is not None:
            process.end()

    def load_base(self, config: FineTuneConfig, *, shares_layers: bool = False) -> BaseWithAdapter:
        """Return the base, at the run's precision, with a fresh adapter attached.

        The kept base is reused if it was loaded from the same files in the same way, and its frozen
        tensors still have the same checksums. Under `full`, where training changes the base, it is
        always loaded anew. With `shares_layers` all layers share one layer's weights, which saves
        memory: the model is only good for compiling kernels, and so is a base that is reused after
        it.
        """
        if config.fine_tune_type == "full":
            return load_base_with_adapter(config)
        description = describe_base(config)
        if self.base is not None and self.base.description == description:
            if checksum_frozen_tensors(self.base.model) == self.base.checksums:
                self.base.restore_state()
                return self.base
            warnings.warn(
                f"The base model {self.base.folder} that this process holds is no longer what was "
                f"loaded: memory or a program changed it. It is loaded anew; train again if this "
                f"is repeated.",
                RuntimeWarning,
                stacklevel=2,
            )
        self.release_base()  # before the next is loaded: two may not fit into memory
        loaded = load_base_with_adapter(config, shares_layers=shares_layers)
        loaded.description = description
        loaded.checksums = checksum_frozen_tensors(loaded.model)
        loaded.note_state()
        self.base = loaded
        return loaded

    def release_base(self) -> None:
        """Release the kept base, if any, and its device memory."""
        if self.base is not None:
            self.base = None
            mx.clear_cache()

    def keep_proof_process(self, start: Callable[[], Child]) -> None:
        """Start the process for the next proof unless one waits, so that it imports in parallel."""
        if self._proof_process is None:
            self._proof_process = start()

    def take_proof_process(self) -> Child | None:
        """Return the waiting proof process, or None; the caller must end it."""
        process, self._proof_process = self._proof_process, None
        return process
