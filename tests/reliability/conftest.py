"""Sequences of all that is done to a registry have the answers of a person among them."""

from __future__ import annotations

from nested_core.seams import is_there

collect_ignore = [] if is_there("approval") else ["test_registry_sequences.py"]
