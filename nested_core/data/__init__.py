"""Data sets: read by line, judged whole, tokenised as mlx-lm does, batched without state.

Nothing is imported here, so that naming one module does not load pandera, polars or mlx. Pandera
reads its variables when it is first imported, and fails at a word that it does not know: nothing
from outside may switch a check off or break it, so they are dropped before that.
"""

import os

for _name in [name for name in os.environ if name.startswith("PANDERA_")]:
    del os.environ[_name]
