"""Takes a tool's step in a folder; an equal step in an equal folder is run once, then copied."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.silent_failures.cases import Case, Run, Settings, Step, StepFailed
from benchmarks.silent_failures.tools.tool import Tool


def take(tool: Tool, case: Case, step: Step, kept: Path) -> bool:
    """Take a step; whether its commands ended well. `kept` holds what folders were after steps."""
    if not isinstance(step, str):
        step(case)
        return True
    copy = kept / digest_of(tool, case, step)
    if copy.with_suffix(".json").exists():
        return copy_outcome(case, copy)
    first = len(case.runs)
    try:
        getattr(tool, step)(case)
        went_well = True
    except StepFailed:
        went_well = False
    shutil.copytree(case.folder, copy, symlinks=True)
    outcome = {
        "went_well": went_well,
        "runs": [asdict(run) for run in case.runs[first:]],
        "settings": asdict(case.settings),
        "adapter": str(case.adapter.relative_to(case.folder)) if case.adapter.name else "",
        "answers": case.answers,
    }
    copy.with_suffix(".json").write_text(json.dumps(outcome), encoding="utf-8")
    return went_well


def copy_outcome(case: Case, copy: Path) -> bool:
    """Make the folder what it was after the same step was taken; whether that ended well."""
    shutil.rmtree(case.folder)
    shutil.copytree(copy, case.folder, symlinks=True)
    outcome: dict[str, Any] = json.loads(copy.with_suffix(".json").read_text("utf-8"))
    case.runs += [Run(**run) for run in outcome["runs"]]
    settings = outcome["settings"]
    case.settings = Settings(**settings | {"keys": tuple(settings["keys"])})
    if outcome["adapter"]:
        case.adapter = case.folder / outcome["adapter"]
    case.answers = outcome["answers"]
    return bool(outcome["went_well"])


def digest_of(tool: Tool, case: Case, step: str) -> str:
    """What a step depends on: the tool, what is asked for, and every byte of the folder."""
    asked = [getattr(case.settings, field.name) for field in fields(case.settings)]
    said = [tool.version(), step, asked, case.base, case.held_out, case.environment, case.answers]
    digest = hashlib.sha256(repr(said).encode())
    for path in sorted(case.folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(case.folder)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:20]
