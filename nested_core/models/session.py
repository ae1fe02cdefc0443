"""What one fine-tune keeps in memory between its steps; the gate still judges the files on disk.

Adapters are loaded from their files into a base model that stays loaded. That the base did not
change is checked by `checksum_frozen_tensors`, after loading and before each reuse.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import mlx.core as mx
import mlx.nn as nn

from nested_core.backend import to_int
from nested_core.models.base_model import (
    find_model_folder,
    fingerprint_base_model,
    fingerprint_tokenizer,
    load_base_model,
    model_compute_dtype,
)
from nested_core.models.chat_template import Tokenizer
from nested_core.models.lora_attachment import attach_adapter, load_adapter_tensors
from nested_core.models.parameters import trainable_parameters
from nested_core.optim.named_updates import UNSIGNED_DTYPE_BY_BYTES
from nested_core.process.child import Child

if TYPE_CHECKING:
    from nested_core.config.schema import FineTuneConfig
    from nested_core.records.judged_run import JudgedRun
    from nested_core.records.plan import TimePlan

_MAX_WORDS_AT_ONCE = 2**22
_INDEX_FACTOR = 0x9E3779B1  # odd, so that all 2 ** 32 indices give different products
Checksums = Mapping[str, int]


@dataclass(eq=False)
class BaseWithAdapter:
    """A base model with a fresh adapter attached, into which adapters are loaded.

    parameters: the fresh adapter's parameters, by name.
    description: what it was loaded from and how; equal descriptions mean the same computation.
    checksums: of the frozen tensors after loading; None if the base is not reused.
    evaluation_peak: MLX's peak memory in bytes up to the first evaluation of training; 0 if this
        process did not train.
    training_peak: the same for the whole training.
    """

    model: nn.Module
    tokenizer: Tokenizer
    parameters: dict[str, mx.array]
    folder: Path
    description: object = None
    checksums: Checksums | None = field(default=None, repr=False)
    evaluation_peak: int = 0
    training_peak: int = 0
    _modes: list[tuple[nn.Module, bool]] = field(default_factory=list, repr=False)
    _random_key: mx.array | None = field(default=None, repr=False)

    def note_state(self) -> None:
        """Record which modules are in training mode, and mlx's random state."""
        state: Any = mx.random.state
        self._modes = [(module, module.training) for _, module in self.model.named_modules()]
        self._random_key = mx.array(state[0])
        mx.eval(self._random_key)

    def restore_state(self) -> None:
        """Restore the state that `note_state` recorded, and load the fresh adapter again."""
        state: Any = mx.random.state
        for module, is_training in self._modes:
            module._set_training_mode(is_training)
        state[0][:] = self._random_key
        load_adapter_tensors(self.model, self.parameters)


def load_base_with_adapter(
    config: FineTuneConfig, *, as_stored: bool = False, shares_layers: bool = False
) -> BaseWithAdapter:
    """Load a private copy of the base model, and attach a fresh adapter.

    It computes at the run's precision, or as it is stored with `as_stored`.
    """
    model, tokenizer = load_base_model(config, as_stored=as_stored, shares_layers=shares_layers)
    parameters = attach_adapter(model, config)
    return BaseWithAdapter(model, tokenizer, parameters, find_model_folder(config.model))


def describe_base(config: FineTuneConfig) -> object:
    """Return everything that determines a base with a fresh adapter, to compare by equality.

    The thread is included, because MLX's arrays belong to one.
    """
    folder = find_model_folder(config.model)
    return (
        threading.get_ident(),
        str(folder),
        fingerprint_base_model(folder),
        fingerprint_tokenizer(folder),
        config.trust_remote_code,
        model_compute_dtype(config),
        config.fine_tune_type,
        config.num_layers,
        config.lora_parameters.model_dump(mode="json"),
        config.seed,
    )


def frozen_tensors(model: nn.Module) -> dict[str, mx.array]:
    """Return all arrays of a model but the trainable ones, by dotted name.

    Includes arrays that MLX does not count as parameters, such as those whose names begin with "_".
    """
    trainable = trainable_parameters(model).keys()
    arrays = {
        f"{prefix}.{key}" if prefix else key: value
        for prefix, module in model.named_modules()
        for key, value in module.items()
        if isinstance(value, mx.array)
    }
    return {name: array for name, array in arrays.items() if name not in trainable}


def checksum_frozen_tensors(model: nn.Module) -> Checksums:
    """Return for each frozen tensor, by name, a sum over its bits, modulo 2 ** 32.

    Each word of 32 bits is mixed with its index before it is added, as MurmurHash3 mixes the last
    word of a hash. A change of one word always changes the sum. A change of several words, such as
    of all signs, is missed once in 2 ** 32. Integers are added, so the sum does not depend on the
    order. Computed on the tensors' device.
    """
    return {name: _sum_mixed_words(array) for name, array in frozen_tensors(model).items()}


def _sum_mixed_words(array: mx.array) -> int:
    """Return the sum for one tensor, computed in parts so that it needs little memory."""
    if array.size == 0:
        return 0
    words = array.reshape(-1).view(UNSIGNED_DTYPE_BY_BYTES[array.dtype.size])
    if words.nbytes % 4 == 0:
        words = words.view(mx.uint32)
    total = mx.array(0, mx.uint32)
    for start in range(0, words.size, _MAX_WORDS_AT_ONCE):
        part = words[start : start + _MAX_WORDS_AT_ONCE].astype(mx.uint32)
        indices = mx.arange(start, start + part.size, dtype=mx.uint32)
        total = total + mx.sum(_mix_bits(part ^ (indices * _INDEX_FACTOR)))
        mx.eval(total)
    return to_int(total)


def _mix_bits(words: mx.array) -> mx.array:
    """Apply MurmurHash3's fmix32: one to one, and each bit of a word changes half of the others."""
    words = (words ^ (words >> 16)) * 0x85EBCA6B
    words = (words ^ (words >> 13)) * 0xC2B2AE35
    return words ^ (words >> 16)


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
        helpers: the processes that compute losses beside this one while the gate judges, see
            `BatchHelpers`; None without.
    """

    def __init__(self) -> None:
        """Create an empty session."""
        self.base: BaseWithAdapter | None = None
        self.await_kernels: Callable[[Callable[[], bool]], None] | None = None
        self.judged: JudgedRun | None = None
        self.time_plan: TimePlan | None = None
        self.after_step: Callable[[Any], None] | None = None
        self.helpers: Any = None
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
