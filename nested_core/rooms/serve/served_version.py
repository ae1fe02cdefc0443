"""A version in memory: the base's own arrays, with the layers and tensors of one adapter."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from nested_core.errors import ConfigError
from nested_core.models.adapter_fit import describe_other_base
from nested_core.models.lora_attachment import attach_stored_adapter
from nested_core.registry import VerifiedVersion
from nested_core.rooms.serve.canary_check import require_version_in_layers
from nested_core.storage.adapter import Adapter
from nested_core.storage.canary_file import Canary
from nested_core.storage.safetensors_files import StoredTensor
from nested_core.text.digest_format import shorten_digest

BASE_VERSION = "base"


@dataclass
class ServedVersion:
    """One version of a name; two are equal if they are the same version of the same name.

    name: in the registry.
    version: the adapter's digest, or "base" for the base model alone.
    adapter: as read from disk, until its model has been built; None for the base.
    canary: what was recorded of it, to be compared before it is served; None without any.
    stored: the tensors of its file, until those in its layers have been compared with them.
    """

    name: str
    version: str
    adapter: Adapter | None = field(default=None, compare=False, repr=False)
    canary: Canary | None = field(default=None, compare=False, repr=False)
    stored: dict[str, StoredTensor] | None = field(default=None, compare=False, repr=False)
    _model: nn.Module | None = field(default=None, init=False, compare=False, repr=False)

    @classmethod
    def of(cls, name: str, verified: VerifiedVersion) -> Self:
        """A version as it was read from the registry."""
        stored = dict(verified.adapter.tensors)
        return cls(name, verified.version, verified.adapter, verified.canary, stored)

    @property
    def label(self) -> str:
        """What a request's `model` names it by: NAME@VERSION."""
        return f"{self.name}@{self.version}"

    def build_model(self, base: nn.Module) -> nn.Module:
        """The model that answers as this version; it is built at the first call.

        All modules are its own, and all arrays of the base are the base's: a request that began
        with an earlier version keeps that version's model, which nothing changes. Call it in the
        thread that generates. Raises ConfigError where the adapter does not fit the base.
        """
        if self.adapter is not None:
            self._model = _attach_to_copy(base, self.adapter)
            self.adapter = None
        return base if self._model is None else self._model

    def require_in_layers(self, model: nn.Module, base_arrays: Collection[int]) -> None:
        """Compare the tensors of the model that was built with those of the file, the first time.

        Raises CanaryFailed, as `require_version_in_layers` says.
        """
        if self.stored is not None:
            require_version_in_layers(model, self.stored, base_arrays)
            self.stored = None


def require_same_base(verified: VerifiedVersion, base: Path) -> None:
    """Raise ConfigError where a version was made for another model than that in `base`.

    Or trained with another chat template or tokenizer than those in its files.
    """
    adapter = verified.adapter
    what = f"Version {shorten_digest(verified.version)} of {adapter.path.parent.parent.name}"
    verified.tokenizer.require_in(base, what)
    if other_base := describe_other_base(adapter.config, base):
        raise ConfigError(
            f"{what} was {other_base}. Serve it with the base that it was trained on (--model), "
            f"names of other bases by another server."
        )


def _attach_to_copy(base: nn.Module, adapter: Adapter) -> nn.Module:
    leaves: Any = tree_flatten(base)
    arrays = (leaf for _, leaf in leaves if isinstance(leaf, mx.array))
    model: nn.Module = copy.deepcopy(base, {id(array): array for array in arrays})
    attach_stored_adapter(model, adapter)
    model.eval()
    mx.eval(model.parameters())
    return model
