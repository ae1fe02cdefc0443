"""Which tests of preferences are collected."""

from __future__ import annotations

from nested_core.seams import is_there

# Nights of preferences replay rows.
collect_ignore = [] if is_there("replay") else ["test_preference_nights.py"]
