"""The program of a `TokenizerCell`: it imports mlx-lm when it starts, before it is asked anything.

That takes seconds, in which the process that started it goes on. It makes no array and no stream
of MLX, with the first of which a process takes half a gigabyte of a GPU by CUDA, whatever its
default device is (mlx/scheduler.cpp, backend/cuda/allocator.cpp). mlx-lm asks for the state of
random numbers when it is imported, which is an array; nothing is drawn here.
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

    mx.random.state = []  # type: ignore[attr-defined,unused-ignore]
    import mlx_lm.utils  # noqa: F401

    del mx.random.state  # what another module asks for is as it was

from nested_core.models.tokenizer_cell import do_job as do_job  # noqa: E402
