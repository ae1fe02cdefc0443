"""A GGUF as a model's folder that mlx_lm loads: of the file alone, read by MLX's own reader.

Tensors in float16 and float32 stay so; those in q8_0 become MLX's 8 bits in groups of 32. Read are
the files that `write_gguf` writes; others of the same families and tokenizers are read as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from nested_core.errors import ChildFailed, ConfigError, DamagedError
from nested_core.process.cell import Cell
from nested_core.rooms.export.gguf.families import (
    ARCHITECTURE_BY_MODEL_TYPE,
    config_of,
    rename_tensors,
)
from nested_core.rooms.export.gguf.vocabulary import digest_tokens, save_tokenizer
from nested_core.storage.atomic import write_json
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

GROUP_SIZE = 32  # of MLX's reader
MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF does."""
    if not path.is_file():
        return False
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _):
        return file.read(len(MAGIC)) == MAGIC


def unpack_gguf(path: Path, folder: Path) -> str:
    """Convert a GGUF to a folder that mlx_lm loads; return the SHA-256 of the tokens' texts.

    The file is read in a process with limits: MLX's reader crashes on some damaged files.

    folder: is created if it does not exist.

    Raises DamagedError for a file that is no GGUF, ConfigError for a family or a tokenizer that
    cannot be converted.
    """
    with Cell.for_file(f"{__name__}:_unpack", path, bytes_per_byte=12, has_device=True) as cell:
        try:
            digest: str = cell.ask([str(path), str(folder)])
        except ChildFailed as error:
            raise DamagedError(f"{path} is no sound GGUF: its reader ended: {error}.") from error
    return digest


def _unpack(paths: list[str]) -> str:
    """Do what `unpack_gguf` says, in its child process; `paths` are those of file and folder."""
    path, folder = map(Path, paths)
    try:
        loaded: Any = mx.load(str(path), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError, OSError) as error:
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
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": 8, "mode": "affine"}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_json(folder / "config.json", config)
    return digest_tokens(metadata)


def _plain_value(value: Any) -> Any:
    """Return a value of MLX's reader as a plain one: a number for an array of one."""
    if not isinstance(value, mx.array):
        return value
    plain: Any = value.tolist()
    return plain[0] if isinstance(plain, list) and len(plain) == 1 and value.ndim == 1 else plain
