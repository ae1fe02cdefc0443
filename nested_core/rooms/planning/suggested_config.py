"""A first configuration for a data folder and a model, with a comment for each choice.

The data is judged and tokenised and the memory of a step is forecast, so that lengths, fields and
batch fit; the rest is what the documentation recommends to begin with.
"""

from __future__ import annotations

import json
import math
import shlex
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic_core import from_json

from nested_core import seams
from nested_core.config.loading import parse_config, parse_yaml
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import LoraParameters
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_run_data
from nested_core.data.lines.example_parsing import UNTEMPLATED_FORMATS, RowFormats, find_format
from nested_core.data.lines.other_formats import suggest_field_names
from nested_core.data.sources.split_files import open_splits
from nested_core.models.base_model import find_model_folder, read_model_config
from nested_core.records.dataset import DatasetReport
from nested_core.rooms.planning.learning_rate_rule import BEST_PRODUCTS, USUAL_PRODUCT
from nested_core.rooms.planning.run_explanation import explain_run
from nested_core.storage.adapter import CONFIG_NAME, read_adapter_config
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular
from nested_core.text.value_format import format_count

# tinker-cookbook, hyperparam_utils.py: the rate falls with (2000 / hidden size) to this power.
REFERENCE_WIDTH = 2000
POWERS_OF_WIDTH = {"llama": 0.781}
POWER_OF_OTHERS = 0.0775
RANK = 8
ALPHA = 160
EPOCHS = 3  # or more, until there are
MIN_STEPS = 200  # but at most
MAX_EPOCHS = 20
# With another loss than the cross-entropy, such as dpo: passes until there are so many steps, and
# EPOCHS at most. At a tenth of the rate and 44 pairs a model of 135M had a loss of 0.003 after 18
# steps; after 120, its chosen answers were less likely by 1.6 nats/token.
STEPS_WITH_ANOTHER_LOSS = 60
SHARE_WITH_ANOTHER_LOSS = 0.1  # of the learning rate for answers to learn
BATCH_SIZES = (8, 4, 2, 1)
EVALUATION_INTERVAL = 0.1  # of the run
SEQ_LENGTH_MULTIPLE = 64  # max_seq_length is a multiple of it
SHORT_ANSWER = 8  # tokens on average, with its end, as labels have
SAMPLE_TOKENS = 24  # tell whether a short answer ends; 64 cost the gate time
_MEMORY_PLACEHOLDER = "MEMORY FORECAST"  # stands for it until it is known
_SUPERVISE_ALL = "  supervise: all  # every answer of a chat but those that its row masks\n"
_RATE_NOTE = """\
# alpha x rate: 0.01 to 0.03 was best for 34 of the 35 models of a published sweep (sft_sweep.md of
# tinker-cookbook); mlx_lm.lora's default is 0.0016"""
_RATE_NOTE_WITH_ANOTHER_LOSS = "# A tenth of the rate that suits the cross-entropy"
_REGISTRY = """\
# registry: {path: registry, name: my-adapter, promote: better}
# continual: {from: champion}  # every run goes on from it, at the learning_rate above
"""
_GATE = "gate:\n  max_val_loss_increase: 0.02\n"


@dataclass(frozen=True)
class SuggestedConfig:
    """A configuration, as YAML with comments too, and the report on the data that it is for."""

    text: str
    config: FineTuneConfig
    report: DatasetReport


@dataclass(frozen=True)
class _Lora:
    """What is trained, as YAML, and the learning rate for it."""

    num_layers: int
    parameters: str
    learning_rate: float
    source: str


def suggest_config(
    model: str,
    data: str,
    drop_fields: Sequence[str] = (),
    adapter: str | None = None,
    *,
    tasks: str = "",
    registry: str = "",
    group: str | None = None,
    minutes: float | None = None,
) -> SuggestedConfig:
    """Suggest a configuration for a model and a data set; its first step fits in memory.

    Args:
        model, data: the values of the keys of these names.
        drop_fields: fields of the rows to leave out on purpose.
        adapter: the adapters.safetensors to go on from; None begins with a fresh adapter.
        tasks: more lines of the section `gate`, such as its `tasks`.
        registry: the sections `registry` and `continual`; empty leaves both to a person.
        group: the field of rows that belong together.
        minutes: how long a run is to take; None counts passes over the data.

    Raises ConfigError if there is no such model or data, DatasetError if the data has errors.
    """
    base: dict[str, Any] = {"model": model, "data": data}
    base |= {"data_policy": {"group": group}} if group else {}
    if drop_fields:
        base["drop_fields"] = list(drop_fields)
    field_names, loss = _look_at_rows(DataSettings(data, drop_fields=tuple(drop_fields)))
    base |= field_names
    first_try = base | {"batch_size": 1} | ({} if loss is None else {"training": {"loss": loss}})
    report, _ = load_run_data(parse_config(first_try, source="the suggestion"))
    report.raise_if_rejected()
    formats = {stats.data_format for stats in report.splits.values()}
    is_of_core = loss is None and len(formats) == 1
    base["data_format"] = formats.pop() if is_of_core else "auto"
    if adapter is not None:
        base["resume_adapter_file"] = adapter
    lora = _choose_lora(find_model_folder(model), adapter)
    render = partial(_render_yaml, base, lora=lora, minutes=minutes, loss=loss)

    def read_report(supervise: str) -> DatasetReport:
        """Return the report on the data under the suggestion; `supervise` chooses the targets."""
        text = render(report, 1, supervise, recomputes=False)
        return load_run_data(parse_config(parse_yaml(text), source="the suggestion"))[0]

    masked, supervise = _choose_targets(read_report, is_of_core=is_of_core)
    if "no-supervised-token" in _list_checks(masked):  # some rows are cut before their answer
        base["data_policy"] = base.get("data_policy", {}) | {"overlong": "drop"}
        masked = read_report(supervise)
    train = masked.splits["train"]
    if train.tokens and train.tokens.supervised <= SHORT_ANSWER * train.rows:
        supervise += (
            f"  sample_tokens: {SAMPLE_TOKENS}  # of an answer to a sample prompt in the gate: "
            f"yours are short\n"
        )
    trained = report if masked.errors else masked
    for batch_size, recomputes in _batch_sizes_and_recomputation(trained):
        text = render(report, batch_size, supervise, recomputes=recomputes)
        config = parse_config(parse_yaml(text), source="the suggestion")
        memory = explain_run(config, measures_speed=False).memory
        text = text.replace(_MEMORY_PLACEHOLDER, memory.describe())
        if memory.fits:
            break
    text = text.replace(_GATE, _GATE + tasks)
    text = text.replace(_REGISTRY, registry or _REGISTRY)
    if registry:  # a split would mostly hold out questions that the champion was trained on
        text = text.replace(_advise_split(base), "")
    return SuggestedConfig(text, config, trained)


def _choose_targets(
    read_report: Callable[[str], DatasetReport], *, is_of_core: bool
) -> tuple[DatasetReport, str]:
    """Choose whether all answers of a row are trained on, or the last one.

    All are if rows have several answers, or if the last one is marked as not to be learnt, unless
    the chat template rewrites earlier turns. Returns the report on the data under this choice, and
    the line of the configuration that makes it; empty for the last answer, the default.

    read_report: returns the report for such a line.
    is_of_core: whether rows are in a format of the core, not of a room.
    """
    last = read_report("")
    has_several = is_of_core and any(one.has_several_answers for one in last.splits.values())
    if has_several or "nothing-to-learn" in _list_checks(last):
        every = read_report(_SUPERVISE_ALL)
        if "prompt-not-a-prefix" not in _list_checks(every):
            return every, _SUPERVISE_ALL
    return last, ""


def _list_checks(report: DatasetReport) -> set[str]:
    return {error.check for error in report.errors}


def suggest_learning_rate(alpha: float, base: Path) -> float:
    """Return the learning rate of a LoRA adapter whose rank x scale is alpha, to one or two digits.

    Args:
        alpha: rank x scale; the rank itself makes no difference.
        base: the base model's folder, of which the type and the hidden size are read.
    """
    product = USUAL_PRODUCT
    config = read_model_config(base)
    section = config.get("text_config")
    text = section if isinstance(section, dict) else config
    width = text.get("hidden_size")
    if isinstance(width, int) and width > REFERENCE_WIDTH:
        power = POWERS_OF_WIDTH.get(str(text.get("model_type")), POWER_OF_OTHERS)
        product = max(BEST_PRODUCTS[0], product * (REFERENCE_WIDTH / width) ** power)
    return float(f"{product / alpha:.1e}")


def _choose_lora(base: Path, adapter: str | None) -> _Lora:
    """Return the settings of a fresh adapter in every linear module, or those of `adapter`.

    Its learning rate is suggested by rank and scale.
    """
    if adapter is None:
        parameters = json.dumps({"rank": RANK, "alpha": ALPHA})
        rate = suggest_learning_rate(ALPHA, base)
        return _Lora(-1, parameters, rate, "LoRA in every layer and linear module")
    described = read_adapter_config(Path(adapter).parent / CONFIG_NAME)
    shape = LoraParameters.model_validate(described.get("lora_parameters") or {})
    rate = suggest_learning_rate(shape.rank * shape.scale, base)
    parameters = json.dumps(shape.model_dump(mode="json", exclude_none=True))
    layers = described.get("num_layers", -1)
    return _Lora(layers, parameters, rate, "what the adapter has that it goes on from")


def _look_at_rows(settings: DataSettings) -> tuple[dict[str, str], str | None]:
    """Find keys for fields of other names than ours, and a loss, by the rows of train.

    The keys are those of more rows than any other; empty if the rows need none. The loss is that of
    a room that some row is made for; None for answers to learn.
    """
    suggestions = [room.suggest_loss for room in seams.load_all(RowFormats)]
    counts: Counter[tuple[tuple[str, str], ...]] = Counter()
    loss: str | None = None
    for row in _iterate_training_rows(settings):
        needed = {} if find_format(row, settings.field_names) else suggest_field_names(row)
        counts[tuple(needed.items())] += 1
        kept = {key: value for key, value in row.items() if key not in settings.drop_fields}
        for suggest in suggestions if loss is None else ():
            loss = loss or suggest(kept)
    return dict(counts.most_common(1)[0][0]) if counts else {}, loss


def _iterate_training_rows(settings: DataSettings) -> Iterator[dict[str, Any]]:
    """Yield the rows of train that are objects of JSON; the report tells of others."""
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        splits = open_splits(settings, Path(spool))
        if "train" not in splits:
            return
        with open_regular(splits["train"].path, UNBOUNDED, follow_links=True) as (lines, _):
            for line in lines:
                try:
                    row = from_json(line.removeprefix(BOM_UTF8), cache_strings="keys")
                except ValueError:
                    continue
                if isinstance(row, dict):
                    yield row


def _batch_sizes_and_recomputation(report: DatasetReport) -> Iterator[tuple[int, bool]]:
    """Yield batch sizes and whether layers are recomputed, the most memory first."""
    rows = min(stats.rows for split, stats in report.splits.items() if split != "test")
    for recomputes in (False, True):
        for size in BATCH_SIZES:
            if size <= rows:
                yield size, recomputes


def _render_yaml(
    base: dict[str, Any],
    report: DatasetReport,
    batch_size: int,
    supervise: str,
    *,
    lora: _Lora,
    minutes: float | None,
    loss: str | None,
    recomputes: bool,
) -> str:
    """Return the YAML for one batch size.

    supervise: lines of the section `training`.
    loss: another one than the cross-entropy, which is trained with at a lower rate; None for that.
    """
    train = report.splits["train"]
    tokens: Any = train.tokens  # a sound train split has some
    counted = [stats.tokens for stats in report.splits.values() if stats.tokens is not None]
    longest = max(split.max for split in counted)
    truncated = sum(split.truncated_rows for split in counted)
    beyond_context = sum(split.beyond_context for split in counted)
    batches = math.ceil(train.rows / batch_size)
    epochs = max(EPOCHS, min(MAX_EPOCHS, math.ceil(MIN_STEPS / batches)))
    why_so_many = ": more hardly helps"
    rate, rate_note, line_of_loss = lora.learning_rate, _RATE_NOTE, ""
    if loss is not None:
        rate, rate_note = rate * SHARE_WITH_ANOTHER_LOSS, _RATE_NOTE_WITH_ANOTHER_LOSS
        line_of_loss = f"  loss: {loss}  # its arguments, such as beta: loss_config\n"
        epochs = min(EPOCHS, math.ceil(STEPS_WITH_ANOTHER_LOSS / batches))
        why_so_many = ": more can make chosen answers unlikely as well"
    elif epochs > EPOCHS:
        usual = f"The usual {EPOCHS} passes would be {EPOCHS * batches:,}"
        wanted = f"{MIN_STEPS} or more are wanted, in {MAX_EPOCHS} passes at most"
        why_so_many = f". {usual}, too few: {wanted}"
    how_long = f"epochs: {epochs}"
    passes = f"# {epochs} passes are {epochs * batches:,} steps of training{why_so_many}.\n"
    if minutes is not None:
        passes = ""
        how_long = f"minutes: {minutes:g}  # as many steps as fit with their verdict"
    kept = "best step by the loss on valid" if "valid" in report.splits else "last step"
    length = max(SEQ_LENGTH_MULTIPLE, -(-longest // SEQ_LENGTH_MULTIPLE) * SEQ_LENGTH_MULTIPLE)
    are_cut = "are left out" if "overlong" in base.get("data_policy", {}) else "are cut"
    cut = f"; {truncated:,} are longer and {are_cut}" if truncated else ""
    if tokens.context is not None and tokens.context < length:
        length = tokens.context  # more is cut, for the model could not see it
        if beyond_context:
            cut = f"; {beyond_context:,} are longer than the model can see and {are_cut}"
    names = "".join(f"{key}: {json.dumps(one, ensure_ascii=False)}\n" for key, one in base.items())
    masks_prompt = str(train.format not in (None, *UNTEMPLATED_FORMATS)).lower()
    return f"""\
# Written by `nested-tune init` for {train.describe_format()}.
# `nested-tune explain -c FILE` says what it will do, `nested-tune train -c FILE` does it. The keys
# at the top are mlx_lm.lora's own. Every key: docs/configuration.md.
{names}
# What is trained: {lora.source}. alpha is rank x scale
# (mlx_lm.lora reads scale): with it, another rank needs no other rate.
num_layers: {lora.num_layers}
lora_parameters: {lora.parameters}
{rate_note}. To try others, in M minutes:
#   nested-tune sweep -c FILE --minutes M
learning_rate: {rate:g}
mask_prompt: {masks_prompt}  # true: the loss counts the answers alone

# Tokens: the longest example has {longest:,}, 95 of 100 of train have {tokens.p95:,} or fewer{cut}.
max_seq_length: {length}
batch_size: {batch_size}  # {_MEMORY_PLACEHOLDER}
grad_checkpoint: {str(recomputes).lower()}  # true: less memory, more time

{passes}# The {kept} is offered.
# What is below 1 is a share of the run, however long.
training:
{line_of_loss}{supervise}  {how_long}
  warmup_steps: 0.05  # the first steps know the gradients least
  decay: cosine  # of the learning rate, to a tenth: the last steps settle
  max_grad_norm: 1.0  # gradients are clipped to this norm
val_batches: -1
steps_per_report: {EVALUATION_INTERVAL / 2:g}
steps_per_eval: {EVALUATION_INTERVAL:g}
save_every: {EVALUATION_INTERVAL:g}

# [1] updates everything at every step. Tiers update parts of the model every 1, 2 and 4 steps: try
# the second line in place of the first where steps are slow, and compare the runs. Only
# `fast: deep` makes steps cheaper; shallow, the default, saves nothing.
nested: {{frequencies: [1]}}
# nested: {{frequencies: [1, 2, 4], fast: deep}}

# The adapter may not leave held-out examples worse than it found them.
{_describe_held_out(base, report)}{_GATE}
# Where a verified adapter is registered, and when it becomes the champion by itself.
{_REGISTRY}"""


def split_command(model: str, data: str, group: str | None = None) -> str:
    """Return the command that draws valid and test from train, to be pasted."""
    options = ["--data", data, "--model", model, "--split", "0.1", "-o", "lora-split.yaml"]
    options += ["--group", group] if group else []
    return shlex.join(("nested-tune", "init", *options))


def _advise_split(base: dict[str, Any]) -> str:
    """Write comment lines with the command that takes rows out of train."""
    group = base.get("data_policy", {}).get("group")
    command = " ".join(split_command(base["model"], base["data"], group).split())
    return f"# To take some rows out of train for both:\n#   {command}\n"


def _describe_held_out(base: dict[str, Any], report: DatasetReport) -> str:
    held_out = {split: stats for split, stats in report.splits.items() if split != "train"}
    if not held_out:
        return (
            "# There is no valid and no test split, so the quality of what was trained is not "
            f"measured.\n{_advise_split(base)}"
        )
    does = {"valid": "chooses the step", "test": "judges the adapter"}
    if "test" not in held_out:  # gate.held_out is auto
        does["valid"] += " and judges the adapter"
    counts = {split: format_count(stats.rows, "example") for split, stats in held_out.items()}
    listed = (f"{held_out[split].file} ({counts[split]}) {does[split]}" for split in held_out)
    return f"# {', '.join(listed)}.\n"
