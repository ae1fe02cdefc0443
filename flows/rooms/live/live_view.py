"""Draws a run anew in its terminal until it ends, at the size that the terminal has then."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.console import ConsoleDimensions  # noqa: TID251
from rich.live import Live

from flows.rooms.live.screen import draw_curve, draw_screen
from flows.terminal.console import POLL_SECONDS, errors
from flows.terminal.run_follower import LiveView, read_object_or_empty
from nested_core.errors import NestedTuneError
from nested_core.records.verdict_file import read_verdict
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.reports.run_progress import RunProgress

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult  # noqa: TID251

MAX_SHOWN_REASONS = 3


def draw_until_done(
    view: RunProgress, run: RunDirectory, done: threading.Event, lock: threading.RLock
) -> None:
    """Draw the screen anew until `done`; before training begins there is none.

    lock: held by whoever changes the view.
    """
    while not view.read():
        if done.wait(POLL_SECONDS):
            return
    is_last = False
    while not is_last:
        size = update_console_size()
        with Live(_Screen(view), console=errors, auto_refresh=False) as live:
            while not is_last and update_console_size() == size:
                is_last = done.wait(POLL_SECONDS)
                with lock:
                    view.read()
                    if is_last:
                        view.outcome = describe_conclusion(view, run)
                if update_console_size() == size:
                    live.refresh()
        if not is_last:  # lines were wrapped anew: where the screen stood is not known
            errors.clear()


def describe_conclusion(view: RunProgress, run: RunDirectory) -> list[str]:
    """Return how it ended: which adapter is offered, or where training stopped; the verdict."""
    result = read_object_or_empty(run.result)
    if not result:
        return [f"ended before training was done, at {_describe_end(view, run)}"]
    said = [view.describe_length(result), view.describe_offered_adapter(result["adapter_step"])]
    with suppress(NestedTuneError, OSError):  # no verdict, or one that is being written
        verdict = read_verdict(run.gate)
        codes = ", ".join(verdict.reason_names[:MAX_SHOWN_REASONS])
        because = f" ({codes})" if codes else ""
        said.append(f"verdict: {verdict.describe()}{because}")
    return said


def _describe_end(view: RunProgress, run: RunDirectory) -> str:
    """Return the step that it came to: a checkpoint may be of a later one than the last report."""
    from nested_core.storage.checkpoint_verification import list_checkpoints  # brings mlx

    checkpoints = list_checkpoints(run.checkpoints)
    newest = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
    if newest > view.last_record["step"]:
        of_all = "" if view.plan is None else f" of {view.plan.steps:,}"
        return f"step {newest:,}{of_all}"
    return view.describe_position()


class _Screen:
    """A run's view at the size that the terminal has when it is drawn."""

    def __init__(self, view: RunProgress) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield draw_screen(self._view, options.max_width, console.size.height)


def update_console_size() -> ConsoleDimensions:
    """Have `errors` take the size that its terminal has now, and return it; see `can_redraw`.

    rich prefers COLUMNS and LINES, which do not follow a resize where a shell or readline has
    exported them.
    """
    width, height = os.get_terminal_size(sys.__stderr__.fileno())  # type: ignore[union-attr]
    if width and height:  # some pseudo-terminals have no size
        errors.size = ConsoleDimensions(width, height)
    return errors.size


LIVE = LiveView(draw_until_done, draw_curve)
