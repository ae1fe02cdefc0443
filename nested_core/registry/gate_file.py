"""Reading gate.json: the verdict on an adapter, and the digest of the adapter that was judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError, DamagedError, GateRejected
from nested_core.storage.strict_files import file_type, read_json

GATE_NAME = "gate.json"
MAX_GATE_BYTES = 64 * 1024 * 1024
LISTED_REASONS = 5


def read_gate(path: Path) -> dict[str, Any]:
    """Read gate.json; ConfigError if it is missing, DamagedError if it holds no verdict."""
    if file_type(path, follow_links=True) == "missing":
        raise ConfigError(
            f"{path} is not there: no gate has judged this adapter. Expected the directory of a "
            "finished run; let the run end, or resume it with --resume."
        )
    gate = read_json(path, MAX_GATE_BYTES)
    if not isinstance(gate, dict) or gate.get("verdict") not in ("passed", "failed"):
        raise DamagedError(f'{path} holds no verdict. Expected "verdict": "passed" or "failed".')
    return gate


def require_passed(gate: dict[str, Any], path: Path) -> None:
    """Raise GateRejected, with the gate's reasons, unless the verdict is "passed".

    DamagedError for "passed" with reasons, which the gate never writes.
    """
    reasons = gate.get("reasons")
    if gate["verdict"] == "passed":
        if reasons:
            raise DamagedError(f"{path} says passed and gives reasons against it: it was edited.")
        return
    codes = [str(reason.get("code")) for reason in reasons or [] if isinstance(reason, dict)]
    raise GateRejected(
        f"The gate rejected this adapter: {', '.join(codes[:LISTED_REASONS]) or 'no reason given'} "
        f"(see {path}). Only an adapter that passed enters a registry; mend what the reasons name "
        "and train again."
    )


def require_digest(gate: dict[str, Any], digest: str, path: Path) -> None:
    """Raise DamagedError unless the verdict was given on the adapter with this digest."""
    trained = gate.get("trained")
    judged = trained.get("digest") if isinstance(trained, dict) else None
    if judged != digest:
        raise DamagedError(
            f"{path} is a verdict on another adapter: it judged {judged!r:.80}, and the adapter "
            f"beside it has the digest {digest}. One of them has changed since; run the gate again."
        )
