"""A GGUF as a model's folder that mlx_lm loads: of the file alone, read by MLX's own reader.

Tensors in float16 and float32 stay so; those in q8_0 become MLX's 8 bits in groups of 32. Read are
the files that `write_gguf` writes; others of the same families and tokenizers are read as well.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from nested_core.errors import ChildFailed, ConfigError, DamagedError
from nested_core.process.child import Child
from nested_core.rooms.export.gguf.families import (
    ARCHITECTURE_BY_MODEL_TYPE,
    ROPE_FREQS,
    change_layout,
    config_of,
    mlx_name,
)
from nested_core.rooms.export.gguf.vocabulary import Vocabulary
from nested_core.storage.atomic import write_json
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

GROUP_SIZE = 32  # of MLX's reader
MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF does."""
    if not path.is_file():
        return False
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _):
        return file.read(len(MAGIC)) == MAGIC


def unpack_gguf(path: Path, folder: Path) -> Path:
    """Write the model of a GGUF into `folder`, which need not exist, and return the folder.

    It is read in a process of its own, because MLX's reader ends the process at some damaged files.
    Raises DamagedError for a file that is no GGUF, ConfigError for a family or a tokenizer that is
    not read here.
    """
    with Child(f"{__name__}:_unpack") as child:
        try:
            child.ask([str(path), str(folder)])
        except ChildFailed as error:
            raise DamagedError(f"{path} is no sound GGUF: its reader ended: {error}.") from error
    return folder


def _unpack(paths: list[str]) -> None:
    path, folder = map(Path, paths)
    tensors, metadata = _read(path)
    architecture = str(metadata.get("general.architecture"))
    if architecture not in ARCHITECTURE_BY_MODEL_TYPE.values():
        raise ConfigError(
            f"{path} holds a model of the architecture {architecture}; read are llama, qwen2, "
            f"qwen3 and gemma3."
        )
    try:
        config = config_of(metadata, tensors)
        vocabulary = Vocabulary.of_metadata(metadata)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path}: its metadata is not understood here: {error}.") from error
    ends = [vocabulary.special[key] for key in ("eos", "eot") if key in vocabulary.special]
    config["eos_token_id"] = ends
    if any(name.endswith(".scales") for name in tensors):
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": 8, "mode": "affine"}
    args = SimpleNamespace(**config)
    weights = {
        mlx_name(architecture, name): change_layout(architecture, name, tensor, args, back=True)
        for name, tensor in tensors.items()
        if name != ROPE_FREQS
    }
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", vocabulary.tokenizer_json())
    write_json(folder / "tokenizer_config.json", vocabulary.tokenizer_config())


def read_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer of a GGUF; raises as `unpack_gguf` does."""
    _, metadata = _read(path)
    try:
        return Vocabulary.of_metadata(metadata)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path}: its tokenizer is not understood here: {error}.") from error


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The tensors of a GGUF, which are read when they are used, and its metadata."""
    if not is_gguf(path):
        raise DamagedError(f"{path} is no GGUF: it does not begin with {MAGIC.decode()}.")
    try:
        loaded: Any = mx.load(str(path), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise DamagedError(f"{path} is no sound GGUF: {error}.") from error
    tensors, metadata = loaded
    return tensors, {key: _plain_value(value) for key, value in metadata.items()}


def _plain_value(value: Any) -> Any:
    """A value of MLX's reader as a plain one: a number for an array of one."""
    if not isinstance(value, mx.array):
        return value
    plain: Any = value.tolist()
    return plain[0] if isinstance(plain, list) and len(plain) == 1 and value.ndim == 1 else plain
