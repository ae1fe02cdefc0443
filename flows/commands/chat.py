"""chat: ask the base model and the adapter the same, and read their answers side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.chat_view import show_answers
from flows.terminal import print_progress
from nested_core.errors import ConfigError
from nested_core.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from nested_core.models.side_by_side import BaseAndAdapter

NEW_CONVERSATION = "/new"
INPUT_PROMPT = "> "


def add_commands(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    chat = commands.add_parser(
        "chat", parents=[shared], help="ask the base and an adapter, and read both answers"
    )
    chat.add_argument(
        "adapter",
        type=Path,
        metavar="RUN_DIR|REGISTRY/NAME",
        help="a run, or the champion of a name in a registry",
    )
    chat.add_argument("--prompt", metavar="TEXT", help="ask this alone, then end")
    chat.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="of an answer; default: 256"
    )
    chat.add_argument(
        "--temperature", type=float, default=0.0, metavar="NUMBER", help="default: 0, greedy"
    )
    chat.set_defaults(run=run_chat)


def run_chat(arguments: argparse.Namespace) -> Callable[[], int]:
    """Load the base with the adapter, then answer what is asked until there is no more."""
    from nested_core.models.generation import Sampling
    from nested_core.models.side_by_side import BaseAndAdapter

    if arguments.max_tokens < 1 or arguments.temperature < 0:
        raise ConfigError("chat: --max-tokens is 1 or more, and --temperature 0 or more.")
    folder, model, trusts = find_adapter_and_base(arguments.adapter)
    print_progress(f"adapter: {folder}")
    both = BaseAndAdapter(folder, model=model, trust_remote_code=trusts)
    sampling = Sampling(arguments.max_tokens, temperature=arguments.temperature)

    def finish() -> int:
        """Answer the prompt, or each line that is typed; standard output is for the answers."""
        prompts = iter([arguments.prompt]) if arguments.prompt is not None else _read_prompts()
        _answer_each_prompt(both, prompts, sampling)
        return 0

    return finish


def find_adapter_and_base(path: Path) -> tuple[Path, str | None, bool]:
    """An adapter's folder, the base that its run names, and whether that may bring code.

    Of a run it is the adapter that it offers, or while it trains the newest checkpoint. Raises
    ConfigError for a path that is neither a run nor a name in a registry.
    """
    run = RunDirectory(path)
    if run.config.is_file():
        from nested_core.config.resume import read_run_config

        run.require_begun()
        config = read_run_config(run)
        return _adapter_of(run), config.model, config.trust_remote_code
    if not (path / "versions").is_dir():
        raise ConfigError(
            f"{path} is neither a run directory (it has no config.yaml) nor a name in a registry "
            f"(it has no versions/). Give what `nested-tune train` printed, or REGISTRY/NAME."
        )
    from nested_core.registry import read_champion

    champion = read_champion(path.parent, path.name)
    if champion is None:
        raise ConfigError(f"{path} has no champion yet: `nested-tune promote` makes one.")
    return path / "versions" / champion, None, False


def _adapter_of(run: RunDirectory) -> Path:
    from nested_core.storage.checkpoint_verification import newest_sound_checkpoint

    if run.adapter.is_dir():
        return run.adapter
    checkpoint = newest_sound_checkpoint(run.checkpoints)
    if checkpoint is None:
        raise ConfigError(f"{run.path} has no adapter and no checkpoint yet: nothing to ask.")
    return checkpoint


def _read_prompts() -> Iterator[str]:
    """What is typed, or each line of standard input; its end is the end."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    print_progress(f"Ctrl-D ends, {NEW_CONVERSATION} begins a new conversation.")
    while True:
        try:
            yield input(INPUT_PROMPT)
        except EOFError:
            return


def _answer_each_prompt(both: BaseAndAdapter, prompts: Iterator[str], sampling: Any) -> None:
    """Answer each prompt; each side remembers its own answers."""
    from nested_core.models.side_by_side import SIDES

    conversations: dict[Any, list[dict[str, str]]] = {side: [] for side in SIDES}
    for prompt in prompts:
        if prompt.strip() == NEW_CONVERSATION:
            conversations = {side: [] for side in SIDES}
            continue
        if not prompt.strip():
            continue
        for messages in conversations.values():
            messages.append({"role": "user", "content": prompt})
        answers = show_answers(both.stream_answers(conversations, sampling))
        for side, messages in conversations.items():
            messages.append({"role": "assistant", "content": answers[side]})
