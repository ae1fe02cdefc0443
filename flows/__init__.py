"""The Prefect flows, and the command line that runs them.

A file for each flow: finetune.py, promote.py, reconcile.py, rollback.py; cli.py is the
command line. commands/, terminal/, flow_runs/, deployment/ and process/ are what they are made of.

Prefect reads its settings when it is first imported, MLX binds its BLAS then, and transformers
looks for torch, so all three are made ready here. A variable that the environment has already stays
as it is.
"""

import os

from nested_core import backend

_ENVIRONMENT_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # the default pickles, failed states included
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
}
for _name, _value in _ENVIRONMENT_DEFAULTS.items():
    os.environ.setdefault(_name, _value)
backend.prepare()
backend.hide_torch_from_transformers()
