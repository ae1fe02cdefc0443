"""gate.json: the verdict on a run, bound by RUN_DIR/MANIFEST.json to the files that it rests on.

The manifest holds the size and SHA-256 of gate.json and of each file that was judged. It finds
accidents and partial edits; whoever can write the whole folder can make another one that agrees.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Write gate.json, and the manifest that binds it to the files that were judged.

    `judged` has the entries of those files, by their path in the run directory. A crash in between
    leaves a gate.json without a manifest, which is no verdict yet. Returns what `bind_verdict`
    would read.
    """
    path = run_dir / GATE_NAME
    (run_dir / MANIFEST_NAME).unlink(missing_ok=True)
    content = render_json(verdict.to_json())
    write_bytes(path, content)
    files = {**judged, GATE_NAME: describe_content(content)}
    write_manifest(run_dir, _manifest_facts(verdict), files)
    return BoundVerdict(run_dir, content, parse_verdict(parse_json(content), path), files)


def _manifest_facts(verdict: Verdict) -> dict[str, Any]:
    return {"kind": "verdict on a run", "verdict": verdict.word}


def has_verdict_manifest(run_dir: Path) -> bool:
    """Whether there is a manifest beside gate.json; without one it is no verdict yet."""
    return file_type(run_dir / MANIFEST_NAME) != "missing"


@dataclass(frozen=True)
class BoundVerdict:
    """A run's verdict, read once, and the files that its manifest says it was given on.

    content: the bytes of gate.json.
    files: the entries of the judged files and of gate.json, by their path in the run directory.
    """

    run_dir: Path
    content: bytes
    verdict: Verdict
    files: dict[str, FileEntry]


def bind_verdict(run_dir: Path, *, must_pass: bool = False) -> BoundVerdict:
    """Read gate.json and the manifest beside it, once each.

    Raises ConfigError without a gate.json, DamagedError if the manifest is missing or damaged, or
    gate.json is not the one that it was written with, or holds no verdict; with `must_pass`
    GateRejected, before anything is said of the manifest, for a verdict that is not "passed".
    """
    path = run_dir / GATE_NAME
    _require_judged(path)
    content = read_regular(path, MAX_GATE_BYTES)
    unreadable: DamagedError | None = None
    verdict = None
    try:
        verdict = parse_verdict(parse_json(content), path)
    except DamagedError as error:
        unreadable = error
    except ValueError as error:
        unreadable = DamagedError(f"{path} is not valid JSON: {error}.")
    if must_pass and verdict is not None:
        require_passed(verdict, path)
    if not has_verdict_manifest(run_dir):
        raise DamagedError(
            f"{run_dir / MANIFEST_NAME} is missing: nothing says that {path} is the verdict on the "
            f"files beside it.",
            advice=JUDGE_AGAIN,
        )
    manifest = read_manifest(run_dir)
    if manifest["files"].get(GATE_NAME) != describe_content(content):
        raise _changed_verdict(run_dir)  # says more than what is wrong with it
    if verdict is None:
        raise unreadable or _changed_verdict(run_dir)
    if manifest["facts"] != _manifest_facts(verdict):
        raise _changed_verdict(run_dir)
    return BoundVerdict(run_dir, content, verdict, manifest["files"])


def read_bound_verdict(run_dir: Path) -> Verdict:
    """The verdict on a run, which its manifest binds to the files that it was given on."""
    return bind_verdict(run_dir).verdict


def _changed_verdict(run_dir: Path) -> DamagedError:
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
    """Raise ConfigError where there is no gate.json."""
    if file_type(path, follow_links=True) == "missing":
        raise ConfigError(
            f"{path} is not there: no gate has evaluated this adapter. Expected the directory of a "
            "finished run. If it trains, let it end. If it was stopped, resume it.",
            advice=go_on_with(path.parent),
        )


def parse_verdict(document: Any, path: Path) -> Verdict:
    """The verdict in the content of a JSON file; DamagedError if it holds none.

    Raises GateRejected for one that says failed without a reason, which no gate writes.
    """
    word = document.get("verdict") if isinstance(document, dict) else None
    if word not in ("passed", "failed"):
        raise DamagedError(f'{path} holds no verdict. Expected "verdict": "passed" or "failed".')
    content = json.dumps(document).encode()
    try:
        parse_json(content)  # refuses numbers that no float holds
        verdict = _VALIDATOR.validate_json(content, strict=True)
        names = seams.join_mappings("verdict_blocks")
        verdict.blocks.update({name: document[name] for name in names if name in document})
    except ValidationError as error:
        raise DamagedError(f"{path} holds no verdict: {describe_first_problem(error)}.") from error
    except ValueError as error:
        raise DamagedError(f"{path} holds no verdict: {error}.") from error
    if word == "passed" and verdict.reasons:
        raise DamagedError(f"{path} says passed and gives reasons against it: it was edited.")
    if word == "failed" and not verdict.reasons:
        raise _rejection("no reason given", path, None)
    return verdict


def require_passed(verdict: Verdict, path: Path) -> None:
    """Raise GateRejected, with the gate's reasons, unless the verdict is "passed"."""
    if verdict.has_passed:
        return
    raise _rejection(", ".join(verdict.reason_names[:MAX_LISTED_REASONS]), path, verdict)


def _rejection(reasons: str, path: Path, verdict: Verdict | None) -> GateRejected:
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
