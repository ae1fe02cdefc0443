"""The registry from Python: promote the adapter of a run, and ask the champion of a name."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nested_core import seams
from nested_core.errors import ConfigError
from nested_core.pipeline.finetune import Answering, Chat, FinetuneResult
from nested_core.pipeline.named_adapters import VERSIONS, find_named_adapter
from nested_core.pipeline.publishing import register_and_promote_run
from nested_core.process.current_user import current_user
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry import read_verified_version
from nested_core.registry.promotion_policy import describe_promotion
from nested_core.registry.versions import version_folder
from nested_core.storage.run_directory import DEFAULT_REGISTRY, RunDirectory
from nested_core.text.digest_format import shorten_digest


@dataclass(frozen=True, repr=False)
class RegisteredAdapter:
    """A registered version of an adapter, which can answer prompts.

    registry, name: the registry's folder, and the name that the version belongs to.
    version: digest of the adapter.
    """

    registry: Path
    name: str
    version: str

    @property
    def folder(self) -> Path:
        """Folder with the version's files; mlx_lm accepts it as --adapter-path."""
        return version_folder(self.registry, self.name, self.version)

    @cached_property
    def verdict(self) -> Verdict:
        """The gate's verdict that the version was registered with."""
        return read_verdict(self.folder / GATE_NAME)

    def ask(self, prompt: str, *, max_tokens: int = 256, temperature: float = 0.0) -> str:
        """Generate the version's answer to a user's message.

        Args:
            prompt: the user's message.
            max_tokens: the answer ends after this number of tokens at the latest.
            temperature: sampling temperature; 0 always takes the likeliest token.

        The base model is loaded at the first call and stays in memory with this object. Raises
        ConfigError if the model cannot see the whole prompt, or if the room chat is not installed.
        """
        return self._loaded.ask("adapter", prompt, max_tokens=max_tokens, temperature=temperature)

    @cached_property
    def _loaded(self) -> Answering:
        """Base model with this adapter, loaded once, after the version's files are verified."""
        read_verified_version(self.registry, self.name, self.version)
        load = seams.load_only(Chat, "ask").load
        return load({"adapter": self.folder}, model=None, trust_remote_code=False)

    def __repr__(self) -> str:
        """Show registry, name, version and the verdict's summary."""
        name_folder = self.registry / self.name
        version = shorten_digest(self.version)
        return f"RegisteredAdapter({name_folder}, version {version}, {self.verdict.summary()})"


def champion(name: str | Path, *, registry: str | Path | None = None) -> RegisteredAdapter:
    """Return the champion of an adapter name, or the version that NAME@VERSION asks for.

    Args:
        name: NAME, REGISTRY/NAME or NAME@VERSION.
        registry: folder of the registry in which NAME is looked up; `registry` by default.

    Raises ConfigError if the name is unknown or has no champion.
    """
    named = find_named_adapter(Path(name), None if registry is None else Path(registry))
    versions = named.folder.parent
    if versions.name != VERSIONS:
        raise ConfigError(f"{name} is no name in a registry: it leads to {named.folder}.")
    folder = versions.parent
    return RegisteredAdapter(folder.parent, folder.name, named.folder.name)


def promote(
    result: FinetuneResult | str | Path,
    name: str,
    *,
    registry: str | Path = DEFAULT_REGISTRY,
    by: str | None = None,
) -> RegisteredAdapter:
    """Make the adapter of a run the champion under a name; register it first if necessary.

    Args:
        result: what `finetune` returned, or a run directory.
        name: the name, without its registry.
        registry: the folder that the name is in.
        by: who promotes it, as the history says; the user of this process by default.

    It overrides the registry's policy; a RuntimeWarning says if that would have refused it, or if
    the previous champion had a lower loss. Raises ConfigError if nothing was trained, GateRejected
    if the verdict is not "passed", DamagedError for damaged files.
    """
    run = result.run if isinstance(result, FinetuneResult) else RunDirectory(Path(result))
    registry = Path(registry)
    done, candidate = register_and_promote_run(run, registry, name, by=by or current_user())
    notes = describe_promotion(registry, name, done, candidate)
    for warning in filter(None, (done.against_policy, notes.warning)):
        warnings.warn(f"{name}: {warning}", RuntimeWarning, stacklevel=2)
    return RegisteredAdapter(registry, name, done.version)
