"""gate.json as a test edits it: any content, with a manifest that agrees with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nested_core.records.verdict_file import GATE_NAME
from nested_core.storage.manifest import (
    MANIFEST_NAME,
    FileEntry,
    describe_file,
    read_manifest,
    write_manifest,
)


def read_gate(path: Path) -> dict[str, Any]:
    """The content of a gate.json."""
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def judged_files(run_dir: Path) -> dict[str, FileEntry]:
    """What the manifest of a run says of the files that were judged."""
    files: dict[str, FileEntry] = read_manifest(run_dir)["files"]
    return {name: entry for name, entry in files.items() if name != GATE_NAME}


def write_gate(run_dir: Path, gate: Mapping[str, Any], judged: Mapping[str, FileEntry]) -> None:
    """Write a gate.json with any content, and the manifest that binds it to what was judged."""
    (run_dir / MANIFEST_NAME).unlink(missing_ok=True)
    (run_dir / GATE_NAME).write_text(json.dumps(gate))
    files = {**judged, GATE_NAME: describe_file(run_dir / GATE_NAME)}
    facts = {"kind": "verdict on a run", "verdict": gate["verdict"]}
    write_manifest(run_dir, facts, files)
