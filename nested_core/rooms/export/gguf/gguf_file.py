"""A model and its tokenizer as a GGUF, and a GGUF as a model's folder that mlx_lm loads.

Of a file that is read, tensors in float16 and float32 stay so; those in q8_0 become MLX's 8 bits in
groups of 32. Read are the files that `write_gguf` writes; others of the same families and
tokenizers are read as well.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from nested_core.errors import ChildFailed, ConfigError, DamagedError
from nested_core.process.cell import Cell
from nested_core.process.child import Child
from nested_core.rooms.export.export_record import FEW_BITS, Quantization
from nested_core.rooms.export.gguf.families import (
    ARCHITECTURE_BY_MODEL_TYPE,
    Family,
    change_layout,
    config_of,
    find_family,
    rename_tensors,
)
from nested_core.rooms.export.gguf.vocabulary import (
    describe_vocabulary,
    digest_tokens,
    save_tokenizer,
)
from nested_core.storage.adapter import Adapter
from nested_core.storage.atomic import write_json
from nested_core.storage.safetensors_files import naming_full_disk
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

Q8_0_BLOCK = 32  # weights of a row that share a scale, here and as MLX reads them
# Of llama_ftype in llama.h
FILE_TYPES: dict[Quantization, int] = {"f16": 1, "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q4_k_m": 15}
STRING_TYPE, HEAD_BYTES = 8, 4096  # of a key's value, in gguf.h; of a file, with its first keys
LLAMA_CPP_PROGRAM = Path(__file__).parent.with_name("llama_cpp_program.py")


def write_gguf(
    path: Path, model: nn.Module, tokenizer: Any, quantization: Quantization, name: str
) -> None:
    """Write a model and its tokenizer to a new GGUF.

    model: without adapter or quantized layers.
    tokenizer: mlx_lm's.
    quantization: the format of matrices, but f16 for those whose rows are no multiple of 32, and
        what llama.cpp takes for rows that are no multiple of 256. Vectors are stored in float32.
    name: the name of the model that programs show.

    Raises ConfigError for a family or a tokenizer that cannot be written as GGUF, and for weights
    that float16 cannot hold.
    """
    if quantization in FEW_BITS:
        unquantized = path.with_name(f"{path.name}.f16")
        write_gguf(unquantized, model, tokenizer, "f16", name)
        with Child(LLAMA_CPP_PROGRAM) as child:
            child.ask({"quantize": [str(unquantized), str(path), FILE_TYPES[quantization]]})
        unquantized.unlink()
        return
    family = find_family(model)
    about = {"general.name": name, "general.file_type": FILE_TYPES[quantization]}
    about |= family.metadata() | describe_vocabulary(tokenizer, int(family.args.vocab_size))
    tensors = family.name_tensors(dict(tree_flatten(model.parameters())))
    _write(path, family, about, tensors | family.extra_tensors(), quantization)


def _write(
    path: Path,
    family: Family,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, mx.array],
    quantization: Quantization | Literal["f32"],
) -> None:
    """Write a new GGUF of tensors by llama.cpp's names, in mlx_lm's layout, one after the other."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape, quantize

    formats = {
        t: GGMLQuantizationType[_format_of(array, quantization)] for t, array in tensors.items()
    }
    writer = GGUFWriter(path, family.architecture)
    for key, value in metadata.items():
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


def digest_vocabulary(model: nn.Module, tokenizer: Any) -> str:
    """Return the SHA-256 of the tokens' texts that the GGUF of a model has.

    Raises ConfigError, as `write_gguf` does, for a family or a tokenizer that it cannot write.
    """
    return digest_tokens(describe_vocabulary(tokenizer, int(find_family(model).args.vocab_size)))


def read_file_type(path: Path) -> Quantization:
    """Return the format of a GGUF's matrices.

    Raises ConfigError for one that is not written here, DamagedError for a file that is no GGUF.
    """
    number = _ask_about(path, "_read_file_type", str(path))
    for name, known in FILE_TYPES.items():
        if number == known:
            return name
    raise ConfigError(
        f"{path} has its matrices in llama.cpp's format {number}; known are "
        f"{', '.join(FILE_TYPES)}. Give a path where there is no file: the base is written there."
    )


def write_gguf_adapter(path: Path, model: nn.Module, adapter: Adapter, name: str) -> None:
    """Write a LoRA to a new GGUF, as llama.cpp's convert_lora_to_gguf.py does; in float32.

    model: its base, for which it was trained.

    Raises ConfigError for what such a file cannot hold: DoRA, whole weights, factors of embeddings.
    """
    meaning, family = adapter.meaning(), find_family(model)
    if meaning["fine_tune_type"] != "lora":
        raise ConfigError(
            f"--gguf-adapter: llama.cpp applies LoRA alone, and this adapter is "
            f"{meaning['fine_tune_type']}. Give --gguf for base and adapter as one model."
        )
    if any("embed_tokens" in tensor for tensor in adapter.tensors):
        raise ConfigError("--gguf-adapter: llama.cpp has no LoRA of embeddings. Give --gguf.")
    about = {"general.name": name, "general.type": "adapter", "adapter.type": "lora"}
    alpha = {"adapter.lora.alpha": float(meaning["scale"] * meaning["rank"])}
    factors = {tensor: array.T for tensor, array in adapter.to_mlx().items()}
    _write(path, family, about | alpha, family.name_tensors(factors), "f32")


def _format_of(array: mx.array, quantization: str) -> str:
    if array.ndim < 2 or quantization == "f32":
        return "F32"
    return "F16" if array.shape[-1] % Q8_0_BLOCK else quantization.upper()


def _require_storable(name: str, values: np.ndarray[Any, Any], stored: str) -> None:
    largest = float(np.abs(values).max(initial=0.0))
    bound = np.inf if stored == "F32" else float(np.finfo(np.float16).max)
    if not largest < bound:
        raise ConfigError(f"--gguf: {name} holds {largest:g}, which {stored.lower()} cannot store.")


MAGIC = b"GGUF"
HEADER = struct.Struct("<4sIQQ")  # magic, version, tensors, keys, as ggml/docs/gguf.md has them
MAX_KEYS = 10_000  # real files have fewer than a hundred


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF does."""
    if not path.is_file():
        return False
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _):
        return file.read(len(MAGIC)) == MAGIC


def is_adapter(path: Path) -> bool:
    """Return whether a GGUF is a LoRA alone: `general.type`, near its beginning, is `adapter`."""
    text = b"adapter"
    kind = b"general.type" + struct.pack("<IQ", STRING_TYPE, len(text)) + text
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _):
        return kind in file.read(HEAD_BYTES)


def unpack_gguf(path: Path, folder: Path) -> str:
    """Convert a GGUF to a folder that mlx_lm loads; return the SHA-256 of the tokens' texts.

    The file is read in a process with limits: MLX's reader crashes on some damaged files.

    folder: is created if it does not exist.

    Raises DamagedError for a file that is no GGUF, ConfigError for a family or a tokenizer that
    cannot be converted.
    """
    return str(_ask_about(path, "_unpack", [str(path), str(folder)]))


def _ask_about(path: Path, function: str, request: object) -> Any:
    """Ask a function of this module about a GGUF, in a process with limits by the file's size."""
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _):
        *_, keys = HEADER.unpack(file.read(HEADER.size).ljust(HEADER.size, b"\0"))
    if keys > MAX_KEYS:
        raise DamagedError(f"{path} is no sound GGUF: its header counts {keys:,} keys.")
    with Cell.for_file(f"{__name__}:{function}", path, bytes_per_byte=12, has_device=True) as cell:
        try:
            return cell.ask(request)
        except ChildFailed as error:
            raise DamagedError(f"{path} is no sound GGUF: its reader ended: {error}.") from error


def _read_file_type(path: str) -> int:
    from gguf import GGUFReader

    try:
        return int(GGUFReader(path).fields["general.file_type"].contents())
    except (ValueError, IndexError, KeyError, OSError, RecursionError) as error:
        raise DamagedError(f"{path} is no sound GGUF: {error}.") from error


def _unpack(paths: list[str]) -> str:
    """Do what `unpack_gguf` says, in its child process; `paths` are those of file and folder."""
    path, folder = map(Path, paths)
    try:
        loaded: Any = mx.load(str(path), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError, OSError) as error:
        if "gguf_tensor_to_f16" in str(error):
            raise ConfigError(
                f"{path} has its matrices in a format that MLX does not read; `nested-tune "
                f"evaluate --in llama.cpp` asks it."
            ) from error
        raise DamagedError(f"{path} is no sound GGUF: {error}.") from error
    tensors = loaded[0]
    metadata = {key: _plain_value(value) for key, value in loaded[1].items()}
    architecture = str(metadata.get("general.architecture"))
    if architecture not in ARCHITECTURE_BY_MODEL_TYPE.values():
        raise ConfigError(
            f"{path} holds a model of the architecture {architecture}; read are llama, qwen2, "
            f"qwen3 and gemma3."
        )
    try:
        config = config_of(metadata, tensors)
        weights = rename_tensors(architecture, tensors, config)
        save_tokenizer(metadata, folder)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path}: its metadata is not understood here: {error}.") from error
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    config["eos_token_id"] = [end for end in ends if end is not None]
    if any(name.endswith(".scales") for name in tensors):
        config["quantization"] = {"group_size": Q8_0_BLOCK, "bits": 8, "mode": "affine"}
    with naming_full_disk(folder):
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_json(folder / "config.json", config)
    return digest_tokens(metadata)


def _plain_value(value: Any) -> Any:
    """Return a value of MLX's reader as a plain one: a number for an array of one."""
    if not isinstance(value, mx.array):
        return value
    return value.item() if value.size == 1 else value.tolist()
