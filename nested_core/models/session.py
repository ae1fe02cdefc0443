"""What one fine-tune holds in memory from step to step; what is judged is still what is on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

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
    """The base that was loaded last, and processes that were started before they are needed.

    `finetune` makes one and hands it to each step; a step that is called alone has its own. It is
    for one thread, as MLX's arrays are.

    Attributes:
        base: the base that is kept, if one is.
        await_kernels: waits for kernels that are compiled ahead, unless its argument says that a
            stop is requested; None if no kernels are compiled.
        judged: the run that was judged last, as its registration needs it; None before.
        time_plan: what came of the run's minutes, for its plan; None without them.
    """

    def __init__(self) -> None:
        self.base: BaseWithAdapter | None = None
        self.await_kernels: Callable[[Callable[[], bool]], None] | None = None
        self.judged: JudgedRun | None = None
        self.time_plan: TimePlan | None = None
        self._proof_process: Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release_base()
        if (process := self.take_proof_process()) is not None:
            process.end()

    def load_base(self, config: FineTuneConfig, *, shares_layers: bool = False) -> BaseWithAdapter:
        """The base, at the run's precision, with a fresh adapter attached.

        It is the one that was loaded before, if that was of the same files, in the same way, and
        each of its frozen tensors has the bits that it had then. A base that training changes,
        under `full`, is loaded anew each time. With `shares_layers` it is good for compiling
        kernels alone (`base_model.share_layers`), as are those that are kept after it.
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
        self.release_base()
        loaded = load_base_with_adapter(config, shares_layers=shares_layers)
        loaded.description = description
        loaded.checksums = checksum_frozen_tensors(loaded.model)
        loaded.note_state()
        self.base = loaded
        return loaded

    def release_base(self) -> None:
        """Let go of the base that is kept, if one is, and of the device's memory that it had."""
        if self.base is not None:
            self.base = None
            mx.clear_cache()

    def keep_proof_process(self, start: Callable[[], Child]) -> None:
        """Start the process of the next proof, unless one waits: it imports beside other work."""
        if self._proof_process is None:
            self._proof_process = start()

    def take_proof_process(self) -> Child | None:
        """The process that waits for a proof, which is the caller's to end from now on."""
        process, self._proof_process = self._proof_process, None
        return process
