"""init and explain: a first configuration, and what one will do before it is run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from flows.commands.command_output import add_output_flag, printer, result_printer, text_printer
from flows.commands.config_flags import add_config_flags, load_config_from_flags
from flows.terminal.console import print_line, print_page, print_progress
from flows.terminal.run_follower import showing_stages
from nested_core.config.sections import MAX_MINUTES
from nested_core.errors import shorten
from nested_core.records.dataset import PromptFormat, held_out_split
from nested_core.storage.atomic import write_bytes
from nested_core.storage.output_places import require_new_output
from nested_core.text.value_format import format_count

if TYPE_CHECKING:
    from nested_core.rooms.planning.suggested_config import SuggestedConfig

TWO_SIDED = 1.96  # standard errors at each side of a 95 % interval
USUAL_SPREAD = 0.2  # nats/token, of the change of a row in a first run (docs/noise.md)


def add_commands(commands: Any) -> None:
    """Add the commands of this module."""
    init = commands.add("init", run_init, "Start", "--data DATA --model MODEL -o lora.yaml")
    init.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="a folder with train.jsonl, or a file, or a pattern such as 'rows/*.csv'",
    )
    init.add_argument("--model", required=True, metavar="MODEL", help="a folder or a hub name")
    init.add_argument(
        "--drop-fields",
        nargs="+",
        default=(),
        metavar="FIELD",
        help="fields of the rows that are left out on purpose, though they hold text",
    )
    how_long = "minutes that a run is to take with its verdict, in place of passes over the data"
    init.add_argument("--minutes", type=_parse_minutes, metavar="M", help=how_long)
    init.add_argument(
        "--resume-adapter-file",
        metavar="FILE",
        help="continue from this adapters.safetensors, in its shape",
    )
    add_output_flag(init, "default: standard output")
    init.set_defaults(write_configuration=write_configuration)  # for rooms that add flags to init
    add_config_flags(commands.add("explain", run_explain, "Start", "-c lora.yaml", json=True))


def _parse_minutes(text: str) -> float:
    """Return the value of --minutes, as `training.minutes` takes it."""
    with suppress(ValueError):
        if 0 < (minutes := float(text)) < MAX_MINUTES:
            return minutes
    raise argparse.ArgumentTypeError(
        f"expected minutes above 0 and below {MAX_MINUTES:,}, such as 5, found {text!r}"
    )


def run_init(arguments: argparse.Namespace) -> Callable[[], int]:
    """Write a commented configuration for a data set and a model.

    Look at the data and the model; write the configuration, over no file that is there.
    """
    return write_configuration(arguments, require_new_output(arguments.output), arguments.data)


def write_configuration(
    arguments: argparse.Namespace,
    target: Path | None,
    data: str,
    *,
    tasks: str = "",
    registry: str = "",
    champion_format: PromptFormat | None = None,
) -> Callable[[], int]:
    """Suggest a configuration for this data and write it; return what prints the last line.

    target: the file; None writes it to standard output.
    tasks: lines for its section `gate`.
    registry: its sections `registry` and `continual`; empty for none.
    champion_format: how the rows of the champion begin, if the run goes on from one.
    """
    from nested_core.rooms.planning.suggested_config import split_command, suggest_config

    group = getattr(arguments, "group", None)  # a flag of the room tables
    suggested = suggest_config(
        arguments.model,
        data,
        arguments.drop_fields,
        arguments.resume_adapter_file,
        tasks=tasks,
        registry=registry,
        group=group,
        minutes=arguments.minutes,
    )
    if target is not None:
        write_bytes(target, suggested.text.encode())
    print_progress(*(stats.describe_format() for stats in suggested.report.splits.values()))
    if suggested.report.splits.keys() != {"train"}:
        if warnings := suggested.report.describe_warnings():
            print_progress(warnings)
    else:
        command = split_command(arguments.model, data, group)
        remedy = f"To take rows out of train for it: `{command}`"
        if registry:  # most rows that a split takes would ask what the champion was trained on
            remedy = "Too few rows ask what the champion's data does not: add rows that do"
        print_progress(f"note: there is no data to evaluate the adapter on. {remedy}")
    print_progress(*_describe_rows(suggested, champion_format))
    if (output := arguments.output) is not None:
        told = f"Written: {output}. Next: `nested-tune explain -c {quote(str(output))}`"
        return text_printer(told)
    return printer(lambda: print_page(suggested.text))


def _describe_rows(suggested: SuggestedConfig, champion: PromptFormat | None) -> Iterator[str]:
    """Yield sentences on the rows that a run will train on and be judged by.

    They say, where it applies, that the system text differs from that of the champion's rows
    (`champion`, their format; None without one); how many tokens of the answers are trained on, or
    that rows are too long; and how small a change of the loss the held-out rows can show.
    """
    from nested_core.records import loss_conclusion

    splits, rows = suggested.report.splits, suggested.report.prompt_format
    if rows and champion and rows.system != champion.system:
        now, before = (shorten(one.system or "none that all share") for one in (rows, champion))
        yield (
            f"note: system text of the rows: {now!r}; of the champion's rows: {before!r}. The run "
            f"learns the new one. Rows that correct the champion's are known all the same"
        )
    train = splits["train"]
    if earlier := [one for one in suggested.report.warnings if one.check == "earlier-answers"]:
        yield f"warning: {earlier[0]}"
    elif train.tokens is not None and suggested.config.mask_prompt:
        tokens, cut_rows = f"{train.tokens.supervised:,}", train.tokens.truncated_rows
        if too_long := len(train.dropped.get("overlong", ())) or cut_rows:
            lost = f"cut: {train.tokens.lost_tokens:,} tokens are lost" if cut_rows else "left out"
            of_all = f"{too_long:,} of {train.lines - train.blank:,} rows of {train.file}"
            yield f"warning: {of_all} are too long and {lost}; {tokens} answer tokens are left"
        else:  # no token is lost
            yield f"{train.file}: {tokens} of {tokens} answer tokens are trained on"
    name = held_out_split("auto", splits)
    if name is None or suggested.config.training.loss is not None:
        return
    judging = f"{format_count(splits[name].rows, 'row')} of {splits[name].file} judge the run"
    if splits[name].rows < loss_conclusion.MIN_EXAMPLES:
        yield f"{judging}: {loss_conclusion.TOO_FEW_TO_TELL}, and `promote: better` promotes none"
    else:
        # Half of a 95 % interval of the mean change: a smaller change does not show
        smallest = TWO_SIDED * USUAL_SPREAD / math.sqrt(splits[name].rows)
        yield (
            f"{judging}; where their changes spread by {USUAL_SPREAD} nats/token, they "
            f"{loss_conclusion.describe_smallest_visible(smallest, 'nats/token')}. The verdict "
            f"tells theirs"
        )


def run_explain(arguments: argparse.Namespace) -> Callable[[], int]:
    """Show what a run will train, how long, and in how much memory."""
    config = load_config_from_flags(arguments)
    with showing_stages("explain: loading the libraries"):
        from nested_core.rooms.planning.run_explanation import explain_run  # loads mlx

        subjects = explain_run(config, print_progress).describe()

    def show() -> None:
        """Print a paragraph for each subject."""
        for subject, sentences in subjects.items():
            print_line(f"{subject}: {sentences}")

    return result_printer(arguments, lambda: subjects, show)
