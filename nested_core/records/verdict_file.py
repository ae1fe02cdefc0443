"""gate.json: the verdict on a run, bound by RUN_DIR/MANIFEST.json to the files it was given on.

The manifest holds size and SHA-256 of gate.json and of each file that was judged. It detects
accidents and partial edits, not somebody who rewrites the whole folder consistently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from nested_core import seams
from nested_core.errors import (
    JUDGE_AGAIN,
    ConfigError,
    DamagedError,
    GateRejected,
    describe_first_problem,
    go_on_with,
)
from nested_core.records.verdict import Verdict
from nested_core.storage.atomic import render_json, write_bytes
from nested_core.storage.manifest import (
    MANIFEST_NAME,
    FileEntry,
    describe_content,
    read_manifest,
    write_manifest,
)
from nested_core.storage.untrusted_files import file_type, parse_json, read_json, read_regular

GATE_NAME = "gate.json"
MAX_GATE_BYTES = 64 * 1024 * 1024
MAX_LISTED_REASONS = 5
_VALIDATOR = TypeAdapter(Verdict)


def write_verdict(run_dir: Path, verdict: Verdict, judged: Mapping[str, FileEntry]) -> BoundVerdict:
    """Write gate.json and the manifest that binds it to the judged files.

    judged: size and hash of each judged file, by its path in the run directory.

    A crash between the two writes leaves a gate.json without a manifest, which counts as no
    verdict. Returns what `bind_verdict` would read.
    """
    path = run_dir / GATE_NAME
    (run_dir / MANIFEST_NAME).unlink(missing_ok=True)
    content = render_json(verdict.to_json())
    write_bytes(path, content)
    files = {**judged, GATE_NAME: describe_content(content)}
    write_manifest(run_dir, _manifest_facts(verdict), files)
    return BoundVerdict(run_dir, content, parse_verdict(parse_json(content), path), files)


def _manifest_facts(verdict: Verdict) -> dict[str, object]:
    """Return the facts that the manifest records about a verdict."""
    return {"kind": "verdict on a run", "verdict": verdict.word}


def has_verdict_manifest(run_dir: Path) -> bool:
    """Return whether the manifest beside gate.json exists; without it there is no verdict yet."""
    return file_type(run_dir / MANIFEST_NAME) != "missing"


@dataclass(frozen=True)
class BoundVerdict:
    """A run's verdict and the hashes of the files that it was given on.

    content: the bytes of gate.json.
    files: size and hash of gate.json and of each judged file, by its path in the run directory.
    """

    run_dir: Path
    content: bytes
    verdict: Verdict
    files: dict[str, FileEntry]


def bind_verdict(run_dir: Path, *, must_pass: bool = False) -> BoundVerdict:
    """Read the verdict in gate.json, and check that the manifest beside it was written for it.

    The manifest holds the hash of gate.json and of the files that the verdict is about, and some
    facts of the verdict.

    must_pass: raise GateRejected for a verdict that is not "passed", before the manifest is
        checked.

    Raises ConfigError without a gate.json. Raises DamagedError if the manifest is missing or
    damaged, or if gate.json holds no verdict or another one than the manifest.
    """
    path = run_dir / GATE_NAME
    _require_judged(path)
    content = read_regular(path, MAX_GATE_BYTES)
    # What is wrong with gate.json itself is raised only if the manifest agrees with its bytes: else
    # it was changed after it was written, which says more
    verdict: Verdict | DamagedError
    try:
        verdict = parse_verdict(parse_json(content), path)
    except DamagedError as error:
        verdict = error
    except ValueError as error:
        verdict = DamagedError(f"{path} is not valid JSON: {error}.")
    if must_pass and isinstance(verdict, Verdict):
        require_passed(verdict, path)
    if not has_verdict_manifest(run_dir):
        raise DamagedError(
            f"{run_dir / MANIFEST_NAME} is missing: nothing says that {path} is the verdict on the "
            f"files beside it.",
            advice=JUDGE_AGAIN,
        )
    manifest = read_manifest(run_dir)
    if manifest["files"].get(GATE_NAME) != describe_content(content):
        raise _changed_verdict(run_dir)
    if isinstance(verdict, DamagedError):
        raise verdict
    if manifest["facts"] != _manifest_facts(verdict):
        raise _changed_verdict(run_dir)
    return BoundVerdict(run_dir, content, verdict, manifest["files"])


def _changed_verdict(run_dir: Path) -> DamagedError:
    """Build the error for a gate.json that differs from the manifest."""
    return DamagedError(
        f"{run_dir / GATE_NAME} has changed since the verdict was given: {MANIFEST_NAME} beside it "
        f"holds another digest of it. Bring back what was there; if it is lost:",
        advice=JUDGE_AGAIN,
    )


def read_verdict(path: Path) -> Verdict:
    """Read gate.json; ConfigError if it is missing, DamagedError if it holds no verdict."""
    _require_judged(path)
    return parse_verdict(read_json(path, MAX_GATE_BYTES), path)


def _require_judged(path: Path) -> None:
    """Raise ConfigError if gate.json does not exist."""
    if file_type(path, follow_links=True) == "missing":
        raise ConfigError(
            f"{path} is not there: no gate has evaluated this adapter. Expected the directory of a "
            "finished run. If it trains, let it end. If it was stopped, resume it.",
            advice=go_on_with(path.parent),
        )


def parse_verdict(document: object, path: Path) -> Verdict:
    """Convert the JSON document of gate.json to a Verdict; DamagedError if it is not one.

    path: the file, for messages. A document that says failed without a reason raises GateRejected.
    """
    if not isinstance(document, dict) or document.get("verdict") not in ("passed", "failed"):
        raise DamagedError(f'{path} holds no verdict. Expected "verdict": "passed" or "failed".')
    content = json.dumps(document).encode()
    try:
        parse_json(content)  # refuses numbers that no float holds
        verdict = _VALIDATOR.validate_json(content, strict=True)
        # Blocks of optional packages, of which the validator does not know
        names = {name for room in seams.read_rooms().values() for name in room.verdict_blocks}
        verdict.blocks.update({name: document[name] for name in names if name in document})
    except ValidationError as error:
        raise DamagedError(f"{path} holds no verdict: {describe_first_problem(error)}.") from error
    except ValueError as error:
        raise DamagedError(f"{path} holds no verdict: {error}.") from error
    if document["verdict"] == "passed" and verdict.reasons:
        raise DamagedError(f"{path} says passed and gives reasons against it: it was edited.")
    if document["verdict"] == "failed" and not verdict.reasons:
        raise _rejection("no reason given", path, None)
    return verdict


def require_passed(verdict: Verdict, path: Path) -> None:
    """Raise GateRejected, with the gate's reasons, unless the verdict is "passed"."""
    if verdict.has_passed:
        return
    raise _rejection(", ".join(verdict.reason_names[:MAX_LISTED_REASONS]), path, verdict)


def _rejection(reasons: str, path: Path, verdict: Verdict | None) -> GateRejected:
    """Build the GateRejected error for a verdict that did not pass."""
    return GateRejected(
        f"The gate rejected this adapter: {reasons} (see {path}). Only an adapter that passed "
        "enters a registry; mend what the reasons name and train again.",
        verdict=verdict,
    )


def require_verdict_on_adapter(verdict: Verdict, digest: str, path: Path) -> None:
    """Raise DamagedError unless the verdict was given on the adapter with this digest."""
    if verdict.trained.digest != digest:
        raise DamagedError(
            f"{path} is a verdict on another adapter: it judged {verdict.trained.digest!r:.80}, "
            f"and the adapter beside it has the digest {digest}. One of them has changed since; "
            f"run the gate again."
        )
