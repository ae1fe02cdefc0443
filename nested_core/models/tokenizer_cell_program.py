"""The program of a `TokenizerCell`: it imports mlx-lm when it starts, before it is asked anything.

That takes seconds, in which the process that started it goes on. Its device is the CPU: mlx-lm
makes a stream of the default device when it is imported, and a process with a stream on CUDA holds
half a gigabyte of the GPU.
"""

from __future__ import annotations

from nested_core.backend import (
    collecting_no_garbage,
    hide_torch_from_transformers,
    keep_freed_memory,
)

hide_torch_from_transformers()
keep_freed_memory()
with collecting_no_garbage():
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))
    import mlx_lm.utils  # noqa: F401

from nested_core.models.tokenizer_cell import do_job  # noqa: E402

__all__ = ["do_job"]
