"""The base model: where its folder is, which model it is, and loading it at a precision.

MLX is imported by loading alone: workers and the registry's commands ask for folders only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nested_core import backend
from nested_core.errors import ConfigError, DamagedError, NestedTuneError, shorten
from nested_core.storage.atomic import canonical_json
from nested_core.storage.strict_files import read_json

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from nested_core.config.schema import FineTuneConfig

MAX_CONFIG_BYTES = 16 * 1024 * 1024
PAGE_BYTES = 4096
PAGE_STRIDE = 1024 * 1024


def find_model(model: str) -> Path:
    """The local folder of a model: the path itself, or a hub repository's snapshot."""
    from mlx_lm.utils import _download

    try:
        return Path(_download(model))
    except NestedTuneError:  # a signal's handler may raise in the middle of a download
        raise
    except Exception as error:  # the hub client raises many types where there is no such model
        reason = shorten(error, 160)
        raise ConfigError(
            f"model: {model!r} is no local directory and could not be fetched as a Hugging Face "
            f"repository ({type(error).__name__}: {reason}). Give the path of an mlx model folder, "
            f"or a repository name that can be reached from here."
        ) from error


def count_weights(folder: Path) -> int:
    """About how many weights are in a model's folder, from file sizes and config.json's bits."""
    files = [path for path in folder.glob("*.safetensors") if path.is_file()]
    try:
        config = read_json(folder / "config.json", MAX_CONFIG_BYTES, follow_links=True)
    except (DamagedError, OSError):
        config = None  # loading the model reports what is wrong with the folder
    quantization = config.get("quantization") if isinstance(config, dict) else None
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    if not isinstance(bits, int) or bits <= 0:
        bits = 16
    return sum(path.stat().st_size for path in files) * 8 // bits


def base_fingerprint(folder: Path) -> str:
    """SHA-256 that tells one base model from another, fast at any size.

    It covers config.json and the model's own code, if any, whole; of every weights file its name,
    its size and the first 4 KiB of each MiB, so that the start of its header is covered too.
    """
    digest = hashlib.sha256()
    files = [folder / "config.json", *folder.glob("*.py"), *folder.glob("*.safetensors")]
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(canonical_json([path.name, size]))
        stride = PAGE_STRIDE if path.suffix == ".safetensors" else PAGE_BYTES
        with path.open("rb") as file:
            for offset in range(0, size, stride):
                file.seek(offset)
                digest.update(file.read(PAGE_BYTES))
    return digest.hexdigest()


def find_base(config: FineTuneConfig) -> Path:
    """The configured base model's folder; the backend is set up for a model of its size."""
    folder = find_model(config.model)
    backend.set_operations_per_commit(count_weights(folder))
    return folder


def load_base(config: FineTuneConfig, *, as_stored: bool = False) -> tuple[nn.Module, Any]:
    """Load model and tokenizer as mlx_lm.load does, at the configured precision or as stored."""
    import mlx.core as mx
    from mlx_lm import load

    folder = find_base(config)
    try:
        model, tokenizer = load(
            str(folder),
            tokenizer_config={"trust_remote_code": config.trust_remote_code},
            trust_remote_code=config.trust_remote_code,
            lazy=True,
        )[:2]
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"model: {folder} could not be loaded: {error}") from error
    dtype = compute_dtype(config)
    if dtype is not None and not as_stored:
        model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model, tokenizer


def compute_dtype(config: FineTuneConfig) -> mx.Dtype | None:
    """The dtype of forward and backward pass; None keeps the model's own.

    `auto` is float32 on a CPU, where bfloat16 has no fast matmul, and the model's own elsewhere.
    """
    import mlx.core as mx

    if config.training.reference is not None:
        return None
    if config.training.precision == "auto":
        return mx.float32 if backend.device() == "cpu" else None
    return mx.float32 if config.training.precision == "float32" else mx.bfloat16
