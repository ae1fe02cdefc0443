"""Tokenizers are loaded, texts encoded and chat templates rendered in processes with limits.

A chat template is a program of the model's author, and a tokenizer's files can be one: a few bytes
may take gigabytes, never end, or end the process. So a folder's tokenizer is loaded in such a
process before it is loaded here, and what this process renders and encodes is done there. One
process of the kind is kept for that, started when it is first needed; and one more where large
texts of some clients may not keep others waiting.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nested_core.backend import collecting_no_garbage, is_mlx_built_for_cuda, release_freed_memory
from nested_core.errors import (
    CellEnded,
    ChildFailed,
    ConfigError,
    DataWorkerFailed,
    NestedTuneError,
    shorten,
)
from nested_core.process.cell import (
    BASE_BYTES,
    BASE_SECONDS,
    CLOCK_FACTOR,
    SECONDS_PER_BYTE,
    Allowance,
    Cell,
    limit_processor_time,
    size_without_holes,
)
from nested_core.process.child_main import load_function
from nested_core.process.turns import Turns
from nested_core.storage.untrusted_files import read_regular
from nested_core.storage.user_tmpdir import environment_with_user_tmpdir

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# The variables of a process that works on one core: each has a process of its own already.
ONE_CORE = {"TOKENIZERS_PARALLELISM": "false", "POLARS_MAX_THREADS": "1"}
CUDA_LIBRARY_BYTES = 512 * 2**20  # a generous share for what MLX's libraries for CUDA relocate
BYTES_PER_TOKENIZER_BYTE = 24  # of memory, while it is loaded
BYTES_PER_CHARACTER = 800  # of memory, while a text is encoded: a digit can be a token
BYTES_PER_CHARACTER_OF_ALL = 100  # more, for what is made of all lines of a file
TEXT_SECONDS = 3.0  # of processor time; most templates take less than a millisecond
SECONDS_PER_CHARACTER = 1e-5  # more for what is long
CLOCK_SECONDS_PER_CHARACTER = 1e-4  # for many rows, each of which has its own limit

KEPT_TOKENIZERS = 2  # that a process keeps loaded
SHORT_TEXT = 64  # characters of a call whose answer is kept
LONG_TEXTS = 50_000  # characters of calls after which freed memory goes back to the system
HANGING_TEXT = 2**20  # characters as which a text counts whose client had one that hung

_lock, _turns, _turns_apart = threading.RLock(), Turns(), Turns()  # of the second cell
_kept: dict[tuple[int, bool], TokenizerCell] = {}  # a process's cells, by its id
_is_cell = threading.Event()
# Whose text it is, of a process that works for several, and whose texts ended the first cell
asking_client: ContextVar[tuple[str, set[str]]] = ContextVar("asking_client", default=("", set()))

# Keys of tokenizer_config.json that name a module of mlx-lm, by its package.
TOKENIZER_CONFIG_KEY_BY_PACKAGE = {
    "chat_templates": "chat_template_type",
    "tool_parsers": "tool_parser_type",
}
# As transformers' tokenization_utils_base.py names what it has warned of.
TOO_LONG_WARNING = "sequence-length-is-longer-than-the-specified-maximum"


class TokenizerFiles(NamedTuple):
    """The folder of a tokenizer, whether its code may run, and the hash of its files.

    The path is absolute, for the cell may have been started in another folder. By the hash changed
    files are loaded again.
    """

    folder: str
    trust_remote_code: bool
    fingerprint: str


class TokenizerCell(Cell):
    """A process that does jobs with tokenizers; one that hits its limits is a ConfigError."""

    def __init__(self) -> None:
        """Start the process."""
        self._sizes: dict[TokenizerFiles, int] = {}  # of those that it was asked for
        self._base_bytes = BASE_BYTES + is_mlx_built_for_cuda() * CUDA_LIBRARY_BYTES
        super().__init__(
            f"{__name__}_program:do_job",
            Allowance(self._base_bytes, BASE_SECONDS, CLOCK_FACTOR * BASE_SECONDS),
            environment=environment_with_user_tmpdir() | ONE_CORE,
        )

    def ask(self, request: Any, seconds: float | None = None) -> Any:
        """Return the answer to a request.

        request: an object that `do_job` answers, with the `files` of a tokenizer (TokenizerFiles),
            how many `characters` of texts there are, and in the `longest` of them if they are
            lines, what is `done` with them, for a message, and, if they are lines of a file, where
            the job writes the current line (`line_file`).

        Raises ConfigError if the process takes more than it may, DataWorkerFailed if it fails.
        """
        files = TokenizerFiles(*request["files"])
        size = _measure(files)
        self._sizes[files] = size
        held = sum(sorted(self._sizes.values())[-KEPT_TOKENIZERS:])
        characters = request["characters"]
        to_load = BASE_SECONDS + SECONDS_PER_BYTE * size
        by_length = SECONDS_PER_CHARACTER * characters * ("line_file" not in request)
        text_seconds = TEXT_SECONDS + by_length  # of lines, each has its own: at least this
        self.allowance = Allowance(
            self._base_bytes
            + BYTES_PER_TOKENIZER_BYTE * held
            + BYTES_PER_CHARACTER * request.get("longest", characters)
            + BYTES_PER_CHARACTER_OF_ALL * characters,
            text_seconds if characters else to_load,
            CLOCK_FACTOR * (to_load + CLOCK_SECONDS_PER_CHARACTER * characters),
        )
        try:
            return super().ask({**request, "seconds_to_load": to_load}, seconds)
        except CellEnded as ended:
            raise ConfigError(
                f"model: {request['done']}{_read_line(request.get('line_file'))} was ended: "
                f"{ended}. The cause is the chat template or tokenizer in {files.folder}: mend "
                f"it, or give another model."
            ) from None
        except ChildFailed as failure:
            raise DataWorkerFailed(
                f"A process that makes tokens failed, and nothing was written. Start again: "
                f"{failure}"
            ) from failure


@lru_cache(maxsize=4)
def _measure(files: TokenizerFiles) -> int:
    """Return the bytes that a tokenizer's files take on disk."""
    return sum(size_without_holes(f) for f in Path(files.folder).glob("tokenizer*") if f.is_file())


def _read_line(path: str | None) -> str:
    """Return ", line N" with the line that a job was at; empty if it was at none."""
    if path is None or not Path(path).exists():
        return ""
    line = int.from_bytes(read_regular(Path(path)), "little")
    return f", line {line}" if line else ""


def do_job(request: Mapping[str, Any]) -> object:
    """Answer a request in a cell: request["job"], "package.module:function", is called with it."""
    _is_cell.set()
    limit_processor_time(request["seconds_to_load"])
    try:
        return load_function(request["job"])(request)
    finally:
        if request["characters"] > LONG_TEXTS:  # of which the next request may not hold the memory
            release_freed_memory()


def limit_text(characters: int) -> None:
    """Let the processor time for a text begin, if this process is a cell."""
    if _is_cell.is_set():
        limit_processor_time(TEXT_SECONDS + SECONDS_PER_CHARACTER * characters)


def ask_kept_cell(request: Mapping[str, Any], *, is_apart: bool = False) -> Any:
    """Return the answer of the cell that this process keeps, see `TokenizerCell.ask`.

    is_apart: ask the second cell, for which nobody who asks the first one waits. A client whose
        text ended the first one asks the second from then on.
    """
    client, hanging = asking_client.get()
    if not is_apart and client not in hanging:
        with _turns.taking(request["characters"]), _lock:
            if client not in hanging:  # since it waits here
                return _ask_cell(request, is_apart=False)
    with _turns_apart.taking(request["characters"] if is_apart else HANGING_TEXT):
        return _ask_cell(request, is_apart=True)


def _ask_cell(request: Mapping[str, Any], *, is_apart: bool) -> Any:
    """Return a cell's answer; a client whose text ended the first one is remembered."""
    cell = _keep_cell(is_apart)
    try:
        return cell.ask(request)
    except BaseException as error:
        if not isinstance(error, NestedTuneError | OSError):  # a signal: it may answer later
            _end(is_apart)
        client, hanging = asking_client.get()
        if client and not is_apart and isinstance(error, ConfigError):
            hanging.add(client)
        raise


def start_kept_cell() -> None:
    """Start the cell that this process keeps, so that it imports while this process goes on."""
    with _lock:
        _keep_cell(False)


def _keep_cell(is_apart: bool) -> TokenizerCell:
    """Return a cell that this process keeps; started unless it runs."""
    cell = _kept.get((os.getpid(), is_apart))  # a forked process has its parent's
    if cell is None or cell.process.poll() is not None:
        _end(is_apart)
        cell = _kept[os.getpid(), is_apart] = TokenizerCell()
    return cell


def _renew_locks() -> None:
    """Take new locks in a forked process: another thread of its parent may hold the old ones."""
    global _lock, _turns, _turns_apart
    _lock, _turns, _turns_apart = threading.RLock(), Turns(), Turns()


os.register_at_fork(after_in_child=_renew_locks)


@atexit.register
def end_kept_cell() -> None:
    """End the cells that this process keeps; they are started again when they are needed."""
    for is_apart in (False, True):
        _end(is_apart)


def _end(is_apart: bool) -> None:
    if (cell := _kept.pop((os.getpid(), is_apart), None)) is not None:
        cell.end()


@lru_cache(maxsize=KEPT_TOKENIZERS)
def load_bounded_tokenizer(files: TokenizerFiles) -> TokenizerWrapper:
    """Load a tokenizer, which renders and encodes in a cell; ConfigError if it cannot be loaded."""
    if _is_cell.is_set():
        return _load(files)
    try_to_load(files)
    tokenizer = _load(files)
    work_in_cell(tokenizer, files)
    return tokenizer


def work_in_cell(
    tokenizer: TokenizerWrapper, files: TokenizerFiles, apart_from: float = math.inf
) -> None:
    """Have a tokenizer that was loaded from these files render and encode in the kept cell.

    apart_from: characters of a text that the second cell is for, so that others pass it.
    """
    for method in ("apply_chat_template", "encode"):  # which mlx_lm's wrapper passes on
        call = partial(_call_in_cell, files, method, apart_from)
        setattr(tokenizer._tokenizer, method, call)  # noqa: SLF001


@lru_cache(maxsize=4)
def try_to_load(files: TokenizerFiles) -> bool:
    """Load a tokenizer in the kept cell; return whether it has a chat template.

    Raises ConfigError if it cannot be loaded, or takes more than it may.
    """
    start_kept_cell()
    with collecting_no_garbage():  # beside the cell: tokenizer or model are mostly loaded next
        import mlx_lm.utils  # noqa: F401
    has_template: bool = _ask_for(files, None, "loading the tokenizer")
    return has_template


def _call_in_cell(
    files: TokenizerFiles, method: str, apart_from: float, /, *arguments: Any, **options: Any
) -> Any:
    """Call a method of a tokenizer in a kept cell; raise what it raises, by name and text.

    Short texts are made into tokens once: mlx_lm's server asks for those of a line's end in the
    thread of all answers.
    """
    if method == "encode" and len(str(arguments)) + len(str(options)) <= SHORT_TEXT:
        return [*_encode_short(files, arguments, tuple(sorted(options.items())))]
    done = "making tokens of a text"
    return _ask_for(files, method, done, arguments, options, apart_from=apart_from)


@lru_cache(maxsize=256)
def _encode_short(
    files: TokenizerFiles, arguments: tuple[Any, ...], options: tuple[tuple[str, Any], ...]
) -> Any:
    return _ask_for(files, "encode", "making tokens of a text", arguments, dict(options))


def _ask_for(
    files: TokenizerFiles, method: str | None, done: str, *given: Any, apart_from: float = math.inf
) -> Any:
    """Have a kept cell load a tokenizer and call a method of it, with what is given."""
    characters = len(json.dumps(given)) if given else 0
    request = {
        "job": f"{__name__}:call_tokenizer",
        "files": files,
        "method": method,
        "given": given,
        "characters": characters,
        "done": done,
    }
    answer = ask_kept_cell(request, is_apart=characters >= apart_from)
    if "raised" in answer:
        name, text = answer["raised"]
        raise type(name, (Exception,), {})(text)
    return answer["returned"]


def call_tokenizer(request: Mapping[str, Any]) -> dict[str, object]:
    """Load a tokenizer in a cell, and call a method of it: do what `_ask_for` asks for."""
    tokenizer = load_bounded_tokenizer(TokenizerFiles(*request["files"]))
    if request["method"] is None:
        return {"returned": tokenizer.has_chat_template}
    call = getattr(tokenizer._tokenizer, request["method"])  # noqa: SLF001
    arguments, options = request["given"]
    limit_text(request["characters"])
    try:
        return {"returned": call(*arguments, **options)}
    except MemoryError:
        raise
    except BaseException as error:  # a template may raise anything, tokenizers a PanicException
        return {"raised": (type(error).__name__, str(error))}


def _load(files: TokenizerFiles) -> TokenizerWrapper:
    """Load a tokenizer as mlx_lm.load does; ConfigError if it cannot be loaded."""
    from mlx_lm.utils import load_config, load_tokenizer

    folder = Path(files.folder)
    try:
        ends = load_config(folder).get("eos_token_id")
        extra = {"trust_remote_code": files.trust_remote_code}
        tokenizer: TokenizerWrapper = load_tokenizer(folder, extra, eos_token_ids=ends)
    except MemoryError:
        raise
    except BaseException as error:  # tokenizers' PanicException; malformed JSON raises anything
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("mlx_lm."):
            package, _, name = str(error.name).removeprefix("mlx_lm.").partition(".")
            key = TOKENIZER_CONFIG_KEY_BY_PACKAGE.get(package, package)
            reason = f"its {key} {shorten(name)!r} is not one that this mlx-lm has"
        if other := _describe_other_folder(folder):
            raise ConfigError(f"model: {folder} is {other}") from error
        raise ConfigError(
            f"model: no tokenizer could be loaded from {folder} ({reason}). Expected the model's "
            f"config.json, tokenizer.json and tokenizer_config.json there."
        ) from error
    # transformers would warn of a text beyond the model's context, which the data's report counts
    tokenizer.deprecation_warnings[TOO_LONG_WARNING] = True
    return tokenizer


def _describe_other_folder(folder: Path) -> str | None:
    """Describe what is in the place of a model, and what to give instead; None if unknown."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return (
            "an adapter, not a model. Give its base as model; to continue from the adapter itself, "
            "name its adapters.safetensors as resume_adapter_file."
        )
    return None
