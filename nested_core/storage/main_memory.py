"""How much main memory this process may use."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

CGROUP_LIMIT_FILE = Path("/sys/fs/cgroup/memory.max")


@cache
def main_memory_bytes() -> int:
    """Return the size of main memory in bytes, or a container's limit (cgroup v2) if lower."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = CGROUP_LIMIT_FILE.read_text().strip() if CGROUP_LIMIT_FILE.exists() else ""
    return min(installed, int(allowed)) if allowed.isdigit() else installed
