"""A model and its tokenizer as a GGUF file, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from nested_core.errors import ConfigError
from nested_core.rooms.export.gguf.families import change_layout, find_family
from nested_core.rooms.export.gguf.vocabulary import Vocabulary

Quantization = Literal["f16", "q8_0"]
Q8_0_BLOCK = 32  # weights of a row that share a scale
FILE_TYPES = {"f16": 1, "q8_0": 7}  # LLAMA_FTYPE of llama.h


def write_gguf(
    path: Path, model: nn.Module, tokenizer: Any, quantization: Quantization, name: str
) -> None:
    """Write a model without adapter or quantized layers, with mlx_lm's tokenizer, to a new file.

    Matrices are stored in `quantization`, those whose rows no blocks of 32 fill in f16, vectors in
    float32. `name` is what programs show of the file. Raises ConfigError, by name, for a family or
    a tokenizer that GGUF is not written of, and for weights that float16 cannot hold.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    family = find_family(model)
    vocabulary = Vocabulary.of_tokenizer(tokenizer, int(family.args.vocab_size))
    leaves: Any = tree_flatten(model.parameters())
    tensors = {family.tensor_name(given): array for given, array in leaves}
    tensors |= family.extra_tensors()
    formats = {tensor: _format_of(array, quantization) for tensor, array in tensors.items()}
    writer = GGUFWriter(path, family.architecture)
    about = {"general.name": name, "general.file_type": FILE_TYPES[quantization]}
    for key, value in (about | family.metadata() | vocabulary.metadata()).items():
        _add_value(writer, key, value)
    for tensor, array in tensors.items():
        kind = GGMLQuantizationType[formats[tensor].upper()]
        rows, columns = array.size // array.shape[-1], array.shape[-1]
        size = {"f32": 4, "f16": 2}.get(formats[tensor])
        stored = columns * size if size else columns // Q8_0_BLOCK * (Q8_0_BLOCK + 2)
        writer.add_tensor_info(tensor, array.shape, np.dtype(np.float32), rows * stored, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, array in tensors.items():
            laid_out = change_layout(family.architecture, tensor, array, family.args)
            values = np.array(laid_out.astype(mx.float32))
            _require_storable(tensor, values, formats[tensor])
            writer.write_tensor_data(
                quantize(values, GGMLQuantizationType[formats[tensor].upper()])
            )
    finally:
        writer.close()


def _format_of(array: mx.array, quantization: Quantization) -> str:
    if array.ndim < 2:
        return "f32"
    return "f16" if array.shape[-1] % Q8_0_BLOCK else quantization


def _require_storable(name: str, values: np.ndarray[Any, Any], stored: str) -> None:
    largest = float(np.abs(values).max(initial=0.0))
    bound = np.inf if stored == "f32" else float(np.finfo(np.float16).max)
    if not largest < bound:
        raise ConfigError(f"--gguf: {name} holds {largest:g}, which {stored} cannot store.")


def _add_value(writer: Any, key: str, value: Any) -> None:
    """Add a value in GGUF's type for it: whole numbers are uint32, others float32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
