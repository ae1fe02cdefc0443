"""What a run begins now, or will train with, logged for whoever shows it: `stages.info("...")`."""

from __future__ import annotations

import logging

stages = logging.getLogger("nested_core.text.stages")
