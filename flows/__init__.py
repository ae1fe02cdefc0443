"""The Prefect flows, and the command line that runs them.

A file for each flow: finetune.py, promote.py, reconcile.py, rollback.py; cli.py is the
command line. commands/, terminal/, flow_runs/, deployment/ and process/ are what they are made of.

Prefect reads its settings when it is first imported, MLX binds its BLAS then, and transformers
looks for torch, so all three are made ready here. A variable that the environment has already stays
as it is.
"""

import os
import signal
import sys


def _is_program() -> bool:
    """Whether this process runs `nested-tune`, and no program of others that imports it."""
    by_module = sys.argv[0] in {"-m", "flows.cli"} and "flows.cli" in sys.orig_argv
    return by_module or os.path.basename(sys.argv[0]) == "nested-tune"


# Until `cli.main` takes it for an error, an interrupt ends the process at once: imports take long
# enough for a person to press Ctrl-C, and a traceback of them tells nothing.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _is_program():
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from nested_core import backend  # noqa: E402
from nested_core.process.our_packages import prefer_our_packages  # noqa: E402

_ENVIRONMENT_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # the default pickles, failed states included
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
}
for _name, _value in _ENVIRONMENT_DEFAULTS.items():
    os.environ.setdefault(_name, _value)
prefer_our_packages()
backend.prepare()
backend.hide_torch_from_transformers()
