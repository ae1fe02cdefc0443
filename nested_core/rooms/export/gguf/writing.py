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
from nested_core.rooms.export.gguf.vocabulary import describe_vocabulary, digest_tokens

Quantization = Literal["f16", "q8_0"]
Q8_0_BLOCK = 32  # weights of a row that share a scale
FILE_TYPES = {"f16": 1, "q8_0": 7}  # LLAMA_FTYPE of llama.h


def write_gguf(
    path: Path, model: nn.Module, tokenizer: Any, quantization: Quantization, name: str
) -> str:
    """Write a model and its tokenizer to a new GGUF; return the SHA-256 of the tokens' texts.

    model: without adapter or quantized layers.
    tokenizer: mlx_lm's.
    quantization: the format of matrices, but f16 for those whose rows are no multiple of 32.
        Vectors are stored in float32.
    name: the name of the model that programs show.

    Raises ConfigError for a family or a tokenizer that cannot be written as GGUF, and for weights
    that float16 cannot hold.
    """
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape, quantize

    family = find_family(model)
    vocabulary = describe_vocabulary(tokenizer, int(family.args.vocab_size))
    tensors = family.name_tensors(dict(tree_flatten(model.parameters())))
    formats = {
        tensor: GGMLQuantizationType[_format_of(array, quantization)]
        for tensor, array in tensors.items()
    }
    writer = GGUFWriter(path, family.architecture)
    about = {"general.name": name, "general.file_type": FILE_TYPES[quantization]}
    for key, value in (about | family.metadata() | vocabulary).items():
        kind = GGUFValueType.get_type(value)
        writer.add_key_value(
            key, value, GGUFValueType.UINT32 if kind == GGUFValueType.INT32 else kind
        )
    for tensor, array in tensors.items():
        rows = array.size // array.shape[-1]
        stored = quant_shape_to_byte_shape(array.shape[-1:], formats[tensor])[0] * rows
        writer.add_tensor_info(tensor, array.shape, np.dtype(np.float32), stored, formats[tensor])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, array in tensors.items():
            laid_out = change_layout(family.architecture, tensor, array, family.args)
            values = np.array(laid_out.astype(mx.float32))
            _require_storable(tensor, values, formats[tensor].name)
            writer.write_tensor_data(quantize(values, formats[tensor]))
    finally:
        writer.close()
    return digest_tokens(vocabulary)


def _format_of(array: mx.array, quantization: Quantization) -> str:
    if array.ndim < 2:
        return "F32"
    return "F16" if array.shape[-1] % Q8_0_BLOCK else quantization.upper()


def _require_storable(name: str, values: np.ndarray[Any, Any], stored: str) -> None:
    largest = float(np.abs(values).max(initial=0.0))
    bound = np.inf if stored == "F32" else float(np.finfo(np.float16).max)
    if not largest < bound:
        raise ConfigError(f"--gguf: {name} holds {largest:g}, which {stored.lower()} cannot store.")
