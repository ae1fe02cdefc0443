"""A model card for a version, in the form of the Hugging Face hub: README.md in its folder.

It is written when the version is registered, and its manifest holds the hash of it. Its front
matter holds what provenance.json and gate.json prove, and no field that nobody gave: without a
hub's name for the base or the data there is none, and no licence is ever guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from nested_core.config.names import HUB_NAME_PATTERN
from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.records.verdict import Verdict
from nested_core.text.foreign_text import escape_markdown
from nested_core.text.loss_format import format_loss

CARD_NAME = "README.md"
_HUB_CACHE_PATTERN = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/")


def render_card(name: str, version: str, provenance: dict[str, Any], verdict: Verdict) -> str:
    """The card, markdown with YAML in front, by the content of provenance.json and gate.json."""
    front = yaml.safe_dump(_front_matter(name, provenance, verdict), sort_keys=False)
    body = "\n".join(_render_body(name, version, provenance, verdict))
    return f"---\n{front}---\n\n{body}\n"


def _front_matter(name: str, provenance: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    """The metadata of the card: fields of the hub, those alone that are known."""
    config = provenance.get("config") or {}
    fields: dict[str, Any] = {}
    if (base := _hub_name(config.get("model"))) is not None:
        fields["base_model"] = base
        fields["base_model_relation"] = "adapter"
    fields["library_name"] = "mlx"
    fields["pipeline_tag"] = "text-generation"
    fields["tags"] = ["mlx", "nested-tune", str(config.get("fine_tune_type", "lora"))]
    datasets = _hub_datasets(config)
    if datasets:
        fields["datasets"] = datasets
    metrics = list(_model_index_metrics(verdict))
    held_out = (config.get("gate") or {}).get("held_out", "auto")
    is_of_data_set = held_out in SPLITS_BY_HELD_OUT_CHOICE
    if len(datasets) == 1 and metrics and is_of_data_set:  # numbers of data that all can get
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"type": datasets[0], "name": datasets[0]},
            "metrics": metrics,
        }
        fields["model-index"] = [{"name": name, "results": [result]}]
    return fields


def _hub_name(value: object) -> str | None:
    """A name of the hub; None for a folder of this machine or anything else."""
    path = Path(str(value))
    if snapshot := _HUB_CACHE_PATTERN.search(path.absolute().as_posix()):
        return f"{snapshot[1]}/{snapshot[2]}"
    is_name = HUB_NAME_PATTERN.fullmatch(str(value)) is not None and "/" in str(value)
    return str(value) if is_name and not path.exists() else None


def _hub_datasets(config: dict[str, Any]) -> list[str]:
    entries = [entry.get("path") for entry in config.get("hf_dataset") or []]
    named = [_hub_name(value) for value in entries or [config.get("data")]]
    return [name for name in named if name is not None]


def _model_index_metrics(verdict: Verdict) -> Iterator[dict[str, Any]]:
    losses = verdict.validation
    if losses is not None and losses.loss_after is not None:
        name = f"mean loss in nats a token, {losses.file}"
        yield {"type": "loss", "name": name, "value": losses.loss_after}


def _render_body(
    name: str, version: str, provenance: dict[str, Any], verdict: Verdict
) -> Iterator[str]:
    config = provenance.get("config") or {}
    model = str(config.get("model", "unknown"))
    model = _hub_name(model) or Path(model).name  # a card is published: no path of this machine
    yield f"# {escape_markdown(name)}"
    yield ""
    yield (
        f"An adapter ({escape_markdown(str(config.get('fine_tune_type', 'lora')))}) for "
        f"{escape_markdown(model)}, trained and judged by nested-tune. Version "
        f"`{version}`, registered {escape_markdown(str(provenance.get('registered_at', '')))}."
    )
    yield from ("", "## Evaluation", "")
    yield from _render_evaluation(verdict)
    yield from ("", "## Training", "")
    yield from _render_table(("", "value"), _list_training(config, provenance, verdict))
    yield from ("", "## Provenance", "")
    yield from _render_table(("of", "value"), _provenance_rows(provenance))
    yield from ("", "## Use", "")
    yield (
        "The folder of this file is an adapter folder of mlx-lm: give it to `mlx_lm.generate` as "
        "`--adapter-path`, with the base model above as `--model`."
    )


def _render_evaluation(verdict: Verdict) -> Iterator[str]:
    """The gate's measurements, each with its split and number of examples."""
    losses = verdict.validation
    rows: list[tuple[object, ...]] = []
    if losses is not None:
        where = f"{Path(str(losses.file)).name}, {losses.examples} examples"
        before, after = format_loss(losses.loss_before), format_loss(losses.loss_after)
        rows.append(("mean loss, nats a token", where, before, after))
    for task in verdict.tasks:
        counts = [f"{task.count(share)} of {task.questions}" for share in task.shares]
        rows.append((f"right answers, {task.name}", f"{task.questions} questions", *counts))
    if not rows:
        yield "Quality was not measured: there was no held-out data and no suite of questions."
        return
    yield from _render_table(("measure", "on", "before training", "this adapter"), rows)
    conclusion = None if losses is None else losses.describe_conclusion()
    if conclusion is not None:
        yield ""
        yield f"Against the adapter that training began from, the loss is {conclusion}."
    if losses is not None and losses.selected_on_same_data:
        yield ""
        yield "The same examples chose the step that is offered; the loss is a little too good."


def _list_training(
    config: dict[str, Any], provenance: dict[str, Any], verdict: Verdict
) -> Iterator[tuple[object, ...]]:
    """What was trained, then the settings that it was trained with."""
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
    frequencies = (config.get("nested") or {}).get("frequencies")
    if frequencies:
        yield "nested.frequencies", frequencies
    seconds = provenance.get("training_seconds")
    if seconds is not None:
        yield "training, seconds", f"{seconds:.4g}"


def _provenance_rows(provenance: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    for name in ("base_fingerprint", "dataset_digest", "train_digest", "validation_digest"):
        if provenance.get(name) is not None:
            yield name, provenance[name]
    if provenance.get("parent") is not None:
        yield "parent", provenance["parent"]
    yield from sorted((provenance.get("packages") or {}).items())


def _render_table(columns: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield f"| {' | '.join(escape_markdown(str(cell)) for cell in row)} |"
