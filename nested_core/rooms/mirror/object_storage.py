"""Objects below an address such as s3://bucket/prefix: read, fetch, put, list and delete them.

The client is obstore, with the credentials and the endpoint of its own environment variables.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError, DamagedError, shorten
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular, read_regular
from nested_core.text.stages import stages

REQUEST_SECONDS = 20.0  # in which an answer, or its next part, has to come
SECONDS_OF_A_FETCH = 24 * 3600.0  # of a whole object, whose parts come in time
RETRIES = 3
SECONDS_BETWEEN_NEWS = 5.0  # of an answer that takes longer
PART_BYTES = 5 * 2**20
SIGNAL_SECONDS = 0.2  # after which a signal is heard at the latest
FETCHED_BYTES = 2**18  # of an object that is fetched, between two looks at the clock
# In an error of the client: the server's answer, which may name the key's owner, and what follows
ANSWER_PATTERN = re.compile(r"(status code: \d+[^:]*|error response): .*|\n.*", re.DOTALL)
KEY_PATTERN = re.compile(r'\A.*\bpath: ("[^\n]*"),.*', re.DOTALL)  # in the client's error
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3")


class StorageError(ConfigError):
    """Object storage did not answer, or refused a request."""


class ObjectMissing(StorageError):  # noqa: N818 (a state of the storage, which callers expect)
    """There is no object at a key."""


class ObjectChanged(StorageError):  # noqa: N818
    """A conditional request was refused: the object is another by now, or is there already."""


@dataclass(frozen=True)
class StoredObject:
    """An object as a list has it: key, bytes, and the entity tag, another for other content."""

    key: str
    size: int
    tag: str


class ObjectStorage:
    """The objects below an address; keys are relative to it.

    Every method raises StorageError, naming the address, where the storage is away or refuses.
    """

    def __init__(self, address: str, *, seconds: float | None = None) -> None:
        """`seconds` from now every request has ended; those that have not are a StorageError."""
        self.address = address.rstrip("/")
        patience, longest, self._deadline = REQUEST_SECONDS, SECONDS_OF_A_FETCH, math.inf
        if seconds is not None:
            patience = longest = min(REQUEST_SECONDS, seconds / 6)
            self._deadline = time.monotonic() + seconds - 2 * patience  # a try, and its repetition
        try:
            self._client: Any = import_module("obstore")
        except ImportError:
            raise ConfigError(
                f"{address} needs the package obstore, which is not installed here. Install the "
                f"extra: pip install 'nested-tune[mirror]'."
            ) from None
        endpoints = [os.environ.get(name, "") for name in ENDPOINT_VARIABLES]
        if not all(each.startswith(("http://", "https://")) for each in filter(None, endpoints)):
            raise StorageError(
                f"{address} cannot be opened: {' or '.join(ENDPOINT_VARIABLES)} is set to what is "
                f"no http:// or https:// address. Mend it in this process's environment."
            )
        options = {
            "connect_timeout": timedelta(seconds=patience),
            "read_timeout": timedelta(seconds=patience),  # between parts of an answer
            "timeout": timedelta(seconds=longest),
            "allow_http": any(e.startswith("http://") for e in endpoints),  # by its own word
        }
        retry = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=patience)}
        with self._explaining("be opened"):
            from_url = import_module("obstore.store").from_url
            self._store = from_url(self.address, client_options=options, retry_config=retry)

    def read(self, key: str, limit: int) -> tuple[bytes, str]:
        """Return the content of a small object, and its entity tag.

        Raises ObjectMissing, and DamagedError if it is larger than `limit` bytes.
        """
        with self._explaining(f"be read ({key})"):
            answer = _call(self._client.get, self._store, key)
            if answer.meta["size"] > limit:
                raise self._wrong_size(key, answer.meta["size"], f"at most {limit}")
            content = bytes(_call(answer.bytes))
            if len(content) != answer.meta["size"]:
                raise self._client.exceptions.GenericError("the answer was cut off")
        return content, str(answer.meta["e_tag"])

    def fetch(self, key: str, target: Path, *, size: int, tag: str | None = None) -> None:
        """Write an object to a new file, forced to disk.

        tag: the entity tag that it must have; ObjectChanged for another.

        Raises ObjectMissing, and DamagedError if it has not `size` bytes, with nothing written.
        """
        written = 0
        options = None if tag is None else {"if_match": tag}
        with self._explaining(f"be read ({key})"), target.open("xb") as file:
            answer = _call(self._client.get, self._store, key, options=options)
            if answer.meta["size"] != size:
                raise self._wrong_size(key, answer.meta["size"], str(size))
            told = time.monotonic()
            parts = iter(answer.stream(min_chunk_size=FETCHED_BYTES))
            while (part := _call(next, parts, None)) is not None:
                self._require_time()
                if time.monotonic() > told + SECONDS_BETWEEN_NEWS:
                    stages.info(f"fetching {key}: {100 * written // size} % of {size:,} bytes")
                    told = time.monotonic()
                written += len(part)
                file.write(part)
            if written != size:
                raise self._client.exceptions.GenericError("the answer was cut off")
            file.flush()
            os.fsync(file.fileno())

    def put(self, key: str, content: bytes | Path) -> None:
        """Put an object whose key says its content; one that is there is replaced by its equal."""
        with self._explaining(f"be written ({key})"):
            if isinstance(content, Path) and content.stat().st_size > PART_BYTES:
                parts = self._read_parts(content)
                _call(self._client.put, self._store, key, parts, max_concurrency=1)
            else:
                body = content if isinstance(content, bytes) else read_regular(content)
                _call(self._client.put, self._store, key, body, use_multipart=False)

    def replace(self, key: str, content: bytes, tag: str | None) -> None:
        """Put an object if the one that is there has this tag; None: if nothing is there.

        Raises ObjectChanged, with nothing put, if it is another.
        """
        mode = "create" if tag is None else {"e_tag": tag}
        with self._explaining(f"be written ({key})"):
            _call(self._client.put, self._store, key, content, mode=mode)

    def list_objects(self, prefix: str, *, has_folders: bool = True) -> Iterator[StoredObject]:
        """Yield each object whose key begins with the folder `prefix`.

        has_folders: those in its folders, too, whose keys may be such as the client refuses; else
            the prefix is the address.
        """
        with self._explaining("be listed"):
            pages = iter(self._client.list(self._store, prefix or None))
            if not has_folders:
                pages = iter([_call(self._client.list_with_delimiter, self._store)["objects"]])
            while (page := _call(next, pages, None)) is not None:
                self._require_time()
                for meta in page:
                    yield StoredObject(meta["path"], meta["size"], str(meta["e_tag"]))

    def find(self, key: str) -> StoredObject:
        """Return the object at a key; ObjectMissing without one."""
        with self._explaining(f"be read ({key})"):
            meta = _call(self._client.head, self._store, key)
        return StoredObject(key, meta["size"], str(meta["e_tag"]))

    def delete(self, keys: list[str]) -> None:
        """Delete objects; one that is gone is no error."""
        with self._explaining("be deleted from"):
            for key in keys:
                self._require_time()
                with suppress(FileNotFoundError):
                    _call(self._client.delete, self._store, key)

    def _read_parts(self, path: Path) -> Iterator[bytes]:
        """Yield the parts of a file; StorageError, which ends the upload, once time is over."""
        with open_regular(path, UNBOUNDED) as (file, _):
            while part := file.read(PART_BYTES):
                self._require_time()
                yield part

    def _require_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise StorageError(f"{self.address}: the time for it is over")

    def _wrong_size(self, key: str, size: int, expected: str) -> DamagedError:
        return DamagedError(f"{self.address}/{key} has {size} bytes. Expected {expected}.")

    @contextmanager
    def _explaining(self, attempt: str) -> Iterator[None]:
        """Raise the client's errors as StorageError: what could not be done, where, and why.

        attempt: what the address cannot, such as "be read".
        """
        self._require_time()
        errors = self._client.exceptions
        try:
            yield
        except FileNotFoundError as error:
            if error.errno is not None:  # of this machine's disk
                raise
            raise ObjectMissing(f"{self.address} cannot {attempt}: it is not there.") from None
        except (errors.AlreadyExistsError, errors.PreconditionError):
            raise ObjectChanged(f"{self.address} cannot {attempt}: it was changed.") from None
        except errors.InvalidPathError as error:
            key = shorten(KEY_PATTERN.sub(r"\1", str(error)), 300)
            raise StorageError(
                f"{self.address} cannot {attempt}: its client reads no key such as {key}, with an "
                f"empty part, `.`, `..` or a control character. Rename that object, or remove it."
            ) from None
        except BaseException as error:
            is_panic = type(error).__name__ == "PanicException"  # of a bad endpoint, say
            if not is_panic and not isinstance(error, errors.BaseError | ValueError):
                raise
            reason = shorten(ANSWER_PATTERN.sub(r"\1", str(error)).rpartition(" - ")[2], 300)
            raise StorageError(
                f"{self.address} cannot {attempt}: {reason}. Check the address, the network, the "
                f"clock, and the credentials and endpoint in this process's environment "
                f"(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL)."
            ) from None


def _call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call the client in a thread, for no signal is heard while it waits in code of its own."""
    outcome: Future[Any] = Future()

    def call() -> None:
        """Do it, for whoever waits."""
        try:
            outcome.set_result(function(*arguments, **options))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():  # polars has SIGINT restart a wait without end
        thread.join(SIGNAL_SECONDS)
    return outcome.result()
