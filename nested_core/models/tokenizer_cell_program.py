"""The program of a `TokenizerCell`: it imports mlx-lm when it starts, before it is asked anything.

That takes seconds, in which the process that started it goes on. On CUDA it holds half a gigabyte
of the GPU: importing mlx.core makes the allocator already (mlx 0.32.4, by its cache of compiled
functions).
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
    import mlx_lm.utils  # noqa: F401

from nested_core.models.tokenizer_cell import do_job as do_job  # noqa: E402
