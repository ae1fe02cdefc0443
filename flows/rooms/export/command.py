"""export and card: an adapter with its base as one checked model; the model card of a champion."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.adapter_places import ADAPTER_FORMS, add_registry_arguments, add_registry_flag
from flows.commands.command_output import printer, result_printer, show_conversion, text_printer
from flows.terminal.console import print_line, print_page, print_progress
from flows.terminal.run_follower import showing_stages
from nested_core import seams
from nested_core.errors import ConfigError
from nested_core.models.adapter_formats import AdapterFormat
from nested_core.pipeline.named_adapters import find_named_adapter
from nested_core.storage.output_places import require_absent_or_empty, require_output_file
from nested_core.text.stages import stages

if TYPE_CHECKING:
    from typing import Any

    from nested_core.rooms.export.exporting import Export


def add_commands(commands: Any) -> None:
    """Add the commands."""
    usage = "%(prog)s WHAT --fused|--gguf|... TARGET [options]"
    parser = commands.add(
        "export", run_export, "Exchange", "runs/first --gguf model.gguf", json=True, usage=usage
    )
    parser.add_argument(
        "folder", type=Path, metavar=ADAPTER_FORMS, help="the champion of a name, a run, an adapter"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--fused", type=Path, metavar="DIR", help="a model that mlx_lm loads")
    target.add_argument("--gguf", type=Path, metavar="FILE", help="a model that llama.cpp reads")
    target.add_argument(
        "--gguf-adapter", type=Path, metavar="FILE", help="the LoRA alone, which llama.cpp applies"
    )
    parser.add_argument(
        "--base-gguf", type=Path, metavar="FILE", help="base of --gguf-adapter; made if missing"
    )
    parser.add_argument(
        "--for",
        dest="programs",
        nargs="+",
        choices=("ollama", "llama-server", "lmstudio"),
        default=(),
        help="write what these read beside the GGUF; llama-server is asked, if it is here",
    )
    target.add_argument("--peft", type=Path, metavar="DIR", help="as export-peft")
    target.add_argument(
        "--push", metavar="USER/NAME", help="adapter and card to the Hugging Face hub, private"
    )
    parser.add_argument("--public", action="store_true", help="of --push: for everybody to read")
    parser.add_argument("--dry-run", action="store_true", help="of --push: only show what it sends")
    parser.add_argument(
        "--quantize",
        choices=("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"),
        default="f16",
        help="the format of a GGUF's matrices, below 8 bits by llama.cpp; default: f16",
    )
    parser.add_argument(
        "--dequantize", action="store_true", help="of a base in few bits: do not quantize it again"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="held-out rows, else the run's")
    parser.add_argument(
        "--suite",
        nargs="+",
        type=Path,
        default=(),
        metavar="FILE",
        help="questions, scored as in the run's gate.tasks, else by contains; default: gate.tasks",
    )
    add_registry_flag(parser)
    parser.add_argument("--model", metavar="BASE", help="of an adapter that names none")

    card = commands.add("card", run_card, "Registry", "registry/support-bot")
    card.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: standard output")
    add_registry_arguments(card)


def run_export(arguments: argparse.Namespace) -> Callable[[], int]:
    """Write an adapter with its base as one model, and check that.

    A model that does not behave as the adapter with its base raises GateRejected (exit code 4).
    """
    is_adapter = arguments.push is not None or arguments.peft is not None
    if is_adapter and (arguments.programs or arguments.base_gguf):
        raise ConfigError("export: --for and --base-gguf are of a GGUF, not of --push or --peft.")
    if arguments.push is not None:
        return _push(arguments)
    if arguments.public or arguments.dry_run:
        raise ConfigError("export: --public and --dry-run belong to --push USER/NAME.")
    if arguments.peft is not None:
        peft = seams.load_only(AdapterFormat, "--peft")
        require_absent_or_empty(arguments.peft, flag="--peft")
        adapter = find_named_adapter(arguments.folder, arguments.registry).folder
        converted = peft.export_adapter(adapter, arguments.peft, arguments.model)
        return show_conversion(arguments, converted)
    from nested_core.rooms.export.exporting import export  # loads mlx_lm, which takes seconds

    with showing_stages("export: reading the adapter"):
        exported = export(
            arguments.folder,
            fused=arguments.fused,
            gguf=arguments.gguf,
            gguf_adapter=arguments.gguf_adapter,
            base_gguf=arguments.base_gguf,
            programs=arguments.programs,
            quantize=arguments.quantize,
            dequantize=arguments.dequantize,
            suites=arguments.suite,
            data=arguments.data,
            registry=arguments.registry,
            base_model=arguments.model,
            on_stage=stages.info,
        )
    return result_printer(arguments, exported.to_json, lambda: _print_export(exported))


def _push(arguments: argparse.Namespace) -> Callable[[], int]:
    """Upload an adapter with its card; with --dry-run only show what would be sent.

    Returns what prints the result.
    """
    from nested_core.rooms.export.hub_upload import prepare_upload, upload

    prepared = prepare_upload(arguments.folder, arguments.push, arguments.registry)
    for name, content in prepared.files.items():
        print_progress(f"{name}: {len(content):,} bytes")
    if arguments.dry_run:
        show = partial(print_page, f"{prepared.card}\nNothing was sent to {arguments.push}.")
        return result_printer(arguments, prepared.to_json, show)
    sent = upload(prepared, public=arguments.public)
    readers = "everybody can" if arguments.public else "only you and those whom you let can"
    show = partial(print_line, f"{sent.url}: uploaded; {readers} read it")
    return result_printer(arguments, sent.to_json, show)


def _print_export(done: Export) -> None:
    print_line(f"{done.path}: {done.record.describe()}")
    print_line(f"read alone by {done.record.reader}")
    for note in done.record.notes:
        print_line(note)
    for program in done.record.served:
        print_line(f"{program.describe()}; to run it: {program.command(done.path.parent)}")
    print_line(f"to publish it: {done.upload_command}")


def run_card(arguments: argparse.Namespace) -> Callable[[], int]:
    """Write a model card for the champion."""
    from nested_core.rooms.export.adapter_card import read_champion_card
    from nested_core.storage.atomic import write_bytes

    target = None if arguments.output is None else require_output_file(arguments.output, "-o")
    card = read_champion_card(arguments.registry, arguments.name)
    if target is None:
        return printer(lambda: print_page(card))
    write_bytes(target, card.encode())
    return text_printer(f"card: {arguments.output}")
