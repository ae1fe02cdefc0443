"""The folder of a base model: where it is, how large, and which model it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nested_core.errors import ConfigError, DamagedError, NestedTuneError, shorten
from nested_core.storage.atomic import canonical_json
from nested_core.storage.strict_files import read_json

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
    except Exception as error:  # the hub client has many ways to say that there is no such model
        reason = shorten(error, 160)
        raise ConfigError(
            f"model: {model!r} is no local directory and could not be fetched as a Hugging Face "
            f"repository ({type(error).__name__}: {reason}). Give the path of an mlx model folder, "
            f"or a repository name that can be reached from here."
        ) from error


def weights_in(folder: Path) -> int:
    """About how many weights a model's folder holds, as 16-bit numbers or as config.json has it."""
    files = [path for path in folder.glob("*.safetensors") if path.is_file()]
    try:
        config = read_json(folder / "config.json", MAX_CONFIG_BYTES)
    except (DamagedError, OSError):
        config = None  # what is wrong with the folder, its loader says
    quantization = config.get("quantization") if isinstance(config, dict) else None
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    stated = bits if isinstance(bits, int) and bits > 0 else 16
    return sum(path.stat().st_size for path in files) * 8 // stated


def base_fingerprint(folder: Path) -> str:
    """SHA-256 that tells one base model from another.

    It covers config.json and the code of a model that has its own, and of every weights file its
    name, size and a 4 KiB page a MiB (the first page, which holds the header's start, included):
    fast at any size, and no other model agrees on all of it.
    """
    digest = hashlib.sha256()
    parts = [path for kind in ("*.py", "*.safetensors") for path in folder.glob(kind)]
    for path in sorted([folder / "config.json", *parts]):
        size = path.stat().st_size
        digest.update(canonical_json([path.name, size]))
        stride = PAGE_STRIDE if path.suffix == ".safetensors" else PAGE_BYTES
        with path.open("rb") as file:
            for offset in range(0, size, stride):
                file.seek(offset)
                digest.update(file.read(PAGE_BYTES))
    return digest.hexdigest()
