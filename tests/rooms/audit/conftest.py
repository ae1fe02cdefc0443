"""An adapter of PEFT is among those that are audited."""

from __future__ import annotations

from nested_core.seams import is_there

collect_ignore = [] if is_there("peft") else ["test_adapter_audit.py"]
