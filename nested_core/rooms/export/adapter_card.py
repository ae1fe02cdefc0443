"""The model card of a version (README.md, in the form of the Hugging Face hub).

It is written when the version is registered, and the version's manifest holds its hash. The front
matter has only what provenance.json and gate.json prove: base and data set are named only if they
have a name on the hub, and no licence is guessed. Eval sets are named in model-index as the run
names them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from nested_core.config.names import HUB_NAME_PATTERN
from nested_core.errors import ConfigError, quote_path
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_table import check_table
from nested_core.registry import read_champion, verify
from nested_core.registry.registration import ModelCard
from nested_core.registry.versions import CARD_NAME, version_folder
from nested_core.storage.untrusted_files import read_regular
from nested_core.text.document import Block, Document, Section, Table, Text

HOW_TO_USE = (
    "The folder of this file is an adapter folder of mlx-lm: give it to mlx_lm.generate as "
    "--adapter-path, with the base model above as --model. llama-server and Ollama take the file "
    "of `nested-tune export --gguf-adapter`, LM Studio that of `export --gguf`."
)
_HUB_CACHE_PATTERN = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/")


def render_card(name: str, version: str, provenance: dict[str, Any], verdict: Verdict) -> str:
    """Render the card: YAML front matter and Markdown.

    provenance: the content of provenance.json. verdict: the content of gate.json.
    """
    config = provenance.get("config") or {}
    model = str(config.get("model", "unknown"))
    at = provenance.get("registered_at")  # a run's card is written before it is registered
    registered = "" if at is None else f", registered {at}"
    model = find_hub_name(model) or Path(model).name  # a card is published: no path of this machine
    columns = ("of", "value")
    text = Document(
        name,
        [
            Text(
                f"An adapter ({config.get('fine_tune_type', 'lora')}) for {model}, trained and "
                f"evaluated by nested-tune. Version {version}{registered}."
            ),
            Section("Evaluation", list(_describe_evaluation(verdict))),
            Section("Training", [Table("", columns, list(_list_training(provenance, verdict)))]),
            Section("Provenance", [Table("", columns, list(_list_provenance(provenance)))]),
            Section("Use", [Text(HOW_TO_USE)]),
        ],
    )
    return f"---\n{yaml.safe_dump(_front_matter(provenance), sort_keys=False)}---\n\n{text}\n"


def read_champion_card(registry: Path, name: str) -> str:
    """Return the model card (Markdown) that was registered with the champion of `name`.

    Raises ConfigError if the name is unknown or has no champion, DamagedError if the files of the
    version have changed since it was registered.
    """
    version = read_champion(registry, name)
    if version is None:
        raise ConfigError(
            f"{registry / name} has no champion yet, and a card is about the champion. Promote "
            f"a run: `nested-tune promote RUN_DIR --registry {quote_path(registry)} --name {name}`"
        )
    verify(registry, name, version)
    return read_regular(version_folder(registry, name, version) / CARD_NAME).decode()


def _front_matter(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the card's metadata: those fields of the Hugging Face hub whose values are known.

    provenance: the content of provenance.json.
    """
    config = provenance.get("config") or {}
    base = find_hub_name(config.get("model"))
    fields = {
        "base_model": base,
        "base_model_relation": base and "adapter",
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "nested-tune", str(config.get("fine_tune_type", "lora"))],
        "datasets": _hub_datasets(config),
    }
    return {name: value for name, value in fields.items() if value}


def find_hub_name(value: object) -> str | None:
    """Return the hub's name of a model or data set; None for a local folder.

    value: a name, or a path such as one in the hub's cache.
    """
    path = Path(str(value))
    if snapshot := _HUB_CACHE_PATTERN.search(path.absolute().as_posix()):
        return f"{snapshot[1]}/{snapshot[2]}"
    is_name = HUB_NAME_PATTERN.fullmatch(str(value)) is not None and "/" in str(value)
    return str(value) if is_name and not path.exists() else None


def _hub_datasets(config: dict[str, Any]) -> list[str]:
    """Return the hub's names of the configured data sets; local ones are left out."""
    entries = [entry.get("path") for entry in config.get("hf_dataset") or []]
    named = [find_hub_name(value) for value in entries or [config.get("data")]]
    return [name for name in named if name is not None]


def _describe_evaluation(verdict: Verdict) -> Iterator[Block]:
    """Yield the blocks of the section on evaluation: outcome and the gate's measurements."""
    yield Text(f"{verdict.outcome}: {verdict.describe()}.")
    if not verdict.is_measured:
        yield Text("There was no held-out data and no eval set to measure it by.")
    yield check_table(verdict)
    if verdict.validation is not None and verdict.validation.selected_on_same_data:
        yield Text("The same examples selected the checkpoint: this loss is slightly optimistic.")


def _list_training(provenance: dict[str, Any], verdict: Verdict) -> Iterator[tuple[object, ...]]:
    """Yield rows of a table, name and value: how much was trained, then the training settings.

    What is not recorded is left out.

    provenance: the content of provenance.json.
    """
    config = provenance.get("config") or {}
    if (trained := provenance.get("trained")) is not None:
        yield "steps", f"{trained['steps']:,} of {trained['planned_steps']:,}"
        yield f"passes over {trained['file']}", f"{trained['epochs']:.3g}"
    if verdict.adapter_step is not None:
        yield "step of this adapter", f"{verdict.adapter_step:,}"
    names = ("batch_size", "grad_accumulation_steps", "learning_rate", "optimizer", "num_layers")
    for key in (*names, "mask_prompt", "max_seq_length", "seed"):
        if key in config:
            yield key, config[key]
    lora = config.get("lora_parameters") or {}
    yield from ((f"lora_parameters.{key}", lora[key]) for key in ("rank", "scale") if key in lora)
    if frequencies := (config.get("nested") or {}).get("frequencies"):
        yield "nested.frequencies", frequencies
    if (seconds := provenance.get("training_seconds")) is not None:
        yield "training, seconds", f"{seconds:.4g}"


def _list_provenance(provenance: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    """Yield name and value of the fingerprints, the parent version and the package versions."""
    digests = ("base_fingerprint", "dataset_digest", "train_digest", "validation_digest", "parent")
    for key in digests:
        if provenance.get(key) is not None:
            # That of validation is of whichever set judged
            yield key.replace("validation", "held_out"), provenance[key]
    yield from sorted((provenance.get("packages") or {}).items())


CARD = ModelCard(render_card)
