"""serve: mlx_lm.server, following the champions of a registry."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.commands.config_flags import add_log_format, parse_size
from flows.process.stop_signals import INTERRUPTED_EXIT_CODE
from flows.terminal.console import print_progress
from nested_core.errors import ConfigError, shorten
from nested_core.process.command_parent import STOP_SIGNALS
from nested_core.text.digest_format import shorten_digest
from nested_core.text.json_log import JsonFormatter

API_KEY_VARIABLE = "NESTED_TUNE_API_KEY"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def add_commands(commands: Any) -> None:
    """Add the command."""
    serve = commands.add("serve", run_serve, "Serve", "--name support-bot")
    serve.add_argument(
        "--registry", type=Path, default=Path("registry"), metavar="DIR", help="default: registry"
    )
    serve.add_argument(
        "--name",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME",
        help="in the registry; the first answers requests without a model",
    )
    serve.add_argument("--no-api-key", action="store_true", help="answer everybody who asks")
    add_log_format(serve)
    add_mlx_lm_server_options(serve.add_argument_group("options of mlx_lm.server"))


def add_mlx_lm_server_options(group: Any) -> None:
    """Add mlx_lm.server's options with its defaults, less --adapter-path and --pipeline.

    mlx_lm builds its parser inside of `main`; a test compares these with what stands there.
    """
    add, split = group.add_argument, re.compile(r"[^,\s]+").findall
    add("--model", metavar="MODEL", help="the base (default: the adapter's own)")
    add("--host", default="127.0.0.1", metavar="HOST", help="default: 127.0.0.1")
    add("--port", type=int, default=8080, help="0: any free one (default: 8080)")
    add("--allowed-origins", type=split, default=[], metavar="ORIGIN,...", help="default: none")
    add("--draft-model", metavar="MODEL", help="for speculative decoding")
    add("--num-draft-tokens", type=int, default=3, metavar="N", help="default: 3")
    add("--trust-remote-code", action="store_true", help="let the tokenizer bring code")
    add("--log-level", default="INFO", choices=LOG_LEVELS, help="default: INFO")
    add("--chat-template", default="", metavar="TEMPLATE", help="for the tokenizer")
    add("--use-default-chat-template", action="store_true", help="where the tokenizer has none")
    add("--temp", type=float, default=0.0, metavar="NUMBER", help="default: 0")
    add("--top-p", type=float, default=1.0, metavar="NUMBER", help="default: 1")
    add("--top-k", type=int, default=0, metavar="N", help="default: 0, off")
    add("--min-p", type=float, default=0.0, metavar="NUMBER", help="default: 0, off")
    add("--max-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    add("--chat-template-args", type=json.loads, default="{}", metavar="JSON", help="default: {}")
    add("--decode-concurrency", type=int, default=32, metavar="N", help="answers at a time")
    add("--prompt-concurrency", type=int, default=8, metavar="N", help="prompts at a time")
    add("--prefill-step-size", type=int, default=2048, metavar="TOKENS", help="default: 2048")
    add("--prompt-cache-size", type=int, default=10, metavar="N", help="caches kept; default: 10")
    add("--prompt-cache-bytes", type=parse_size, metavar="SIZE", help="of all caches, such as 4GB")
    add("--kv-bits", type=int, metavar="N", help="quantise the caches (default: off)")
    add("--kv-group-size", type=int, default=64, metavar="N", help="default: 64")
    add("--quantized-kv-start", type=int, default=5000, metavar="TOKENS", help="default: 5000")


def _set_up_logging(level: str, log_format: str) -> None:
    """Log to standard error; above DEBUG without what mlx_lm says of each request's progress."""
    from mlx_lm import server

    def is_wanted(record: logging.LogRecord) -> bool:
        """Return whether a record is a warning, or not mlx_lm's."""
        return record.levelno > logging.INFO or record.pathname != server.__file__

    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter()
        if log_format == "json"
        else logging.Formatter("%(asctime)s - %(levelname)s - %(message)s")
    )
    if level != "DEBUG":
        handler.addFilter(is_wanted)
    logging.basicConfig(level=level, handlers=[handler])


def run_serve(arguments: argparse.Namespace) -> Callable[[], int]:
    """Answer requests with the champions."""
    from nested_core.rooms.serve.server import starting_server

    _set_up_logging(arguments.log_level, arguments.log_format)
    tell = logging.info if arguments.log_format == "json" else print_progress
    server, code = None, 0
    heard: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        """Ask for the end; after the second signal no other is heard."""
        if heard and number == signal.SIGHUP:  # a terminal that closes may send several
            return
        heard.append(number)
        for further in STOP_SIGNALS if len(heard) > 1 else ():
            signal.signal(further, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        with starting_server(arguments, _choose_api_key(arguments)) as server:
            tell(f"serving {_describe_names(server)} at {server.address}")
            for line in _list_system_texts(server):
                tell(line)
            with suppress(KeyboardInterrupt):
                server.serve()
            tell("ending: answers under way are finished; Ctrl-C ends them")
    except KeyboardInterrupt:
        code = INTERRUPTED_EXIT_CODE
    finally:
        # The process ends: a signal that comes now must not become its exit code.
        for number, handler in before.items():
            signal.signal(number, handler if server is None else signal.SIG_IGN)
    if server is not None and not server.generator.has_ended:
        tell("ended by force: an answer under way did not come to its end")
        os._exit(1)  # the thread of the answer would keep the process
    if server is not None and code:
        os._exit(code)  # a second signal: a thread may compute still, which the end would abort
    return lambda: code


def _choose_api_key(arguments: argparse.Namespace) -> str | None:
    """Return the key that clients have to send; ConfigError where it should be there and is not."""
    from nested_core.rooms.serve.http_handler import is_loopback

    key = os.environ.get(API_KEY_VARIABLE)
    is_public = not is_loopback(arguments.host)
    if not key and (key is not None or is_public) and not arguments.no_api_key:
        raise ConfigError(
            f"{API_KEY_VARIABLE} is {'not set' if key is None else 'empty'}: everybody who reaches "
            f"{arguments.host} could ask. Set it to a key, or give --no-api-key to have it so."
        )
    return None if arguments.no_api_key else key


def _list_system_texts(server: Any) -> Iterator[str]:
    """List each name whose training rows all have one system text, which clients send."""
    for name, status in server.follower.names.items():
        if status.current.system is not None:
            text = shorten(status.current.system, 300)
            yield f"{name}: its training rows begin with a system text; send it too: {text}"


def _describe_names(server: Any) -> str:
    """Return each name with the version that is served."""
    names = server.follower.names
    return ", ".join(f"{name}@{shorten_digest(s.current.version)}" for name, s in names.items())
