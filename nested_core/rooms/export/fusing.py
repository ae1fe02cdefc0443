"""A base with an adapter fused into its weights, and the folder that mlx_lm loads it from.

Each module is fused by mlx_lm's own `fuse`, as mlx_lm.fuse does. The tokenizer's files are copied
as they are: transformers writes others than it read. Of two chat templates that differ the one that
is used is written to both places, for programs that read either.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from nested_core.models.base_model import TOKENIZER_FILES, load_lazily, write_used_template
from nested_core.models.lora_attachment import attach_stored_adapter
from nested_core.rooms.export.export_record import WeightFormat
from nested_core.storage.adapter import Adapter
from nested_core.storage.safetensors_files import naming_full_disk

WRITTEN_FILES = ("config.json", "model.safetensors.index.json")
QUANTIZATION_KEYS = ("quantization", "quantization_config")


def load_fused(
    base: Path,
    adapter: Adapter | None,
    *,
    dequantize: bool,
    dtype: mx.Dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Load a base with an adapter fused into its weights; return model, tokenizer and config.json.

    Arrays are computed when they are used.

    base: the base's folder.
    adapter: None loads the base alone.
    dequantize: leave the weights of a quantized base dequantized; else they are quantized again
        after fusing.
    dtype: the dtype in which weights are fused; None is the base's.

    Raises ConfigError if the base cannot be loaded or the adapter does not fit it.
    """
    from mlx_lm.utils import dequantize_model

    model, tokenizer, config = load_lazily(base, trust_remote_code=trust_remote_code)
    if dtype is not None:
        model.set_dtype(dtype)
    if adapter is not None:
        attach_stored_adapter(model, adapter)
    modules: Any = model.named_modules()
    fused = [
        (name, module.fuse(dequantize=dequantize))
        for name, module in modules
        if hasattr(module, "fuse")
    ]
    if fused:
        model.update_modules(tree_unflatten(fused))
    if dequantize:
        model = dequantize_model(model)
        config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    return model, tokenizer, config


def write_model_folder(
    folder: Path, base: Path, model: nn.Module, config: dict[str, Any]
) -> WeightFormat:
    """Write a model to a folder, with the files of its base for tokenizer, template and code.

    Returns the format of its matrices.
    """
    from mlx_lm.utils import save_config, save_model

    with naming_full_disk(folder):
        save_model(folder, model)
    save_config(dict(config), folder / "config.json")
    for pattern in TOKENIZER_FILES:
        for file in sorted(base.glob(pattern)):
            target = folder / file.relative_to(base)
            if target.name not in WRITTEN_FILES and file.is_file():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    write_used_template(folder)
    if "quantization" in config:
        return "quantized"
    leaves: Any = tree_flatten(model.parameters())
    dtype = next(array.dtype for _, array in leaves if array.ndim > 1)
    return cast(WeightFormat, str(dtype).removeprefix("mlx.core."))
