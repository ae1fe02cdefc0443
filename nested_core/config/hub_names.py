"""What a repository of the Hugging Face hub may be called, as huggingface_hub has it."""

from __future__ import annotations

import re

HUB_NAME_PATTERN = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
