"""The steps of a flow run as Prefect tasks: a thin wrapper each, with retries, logs and a page.

finetune.py and promote.py are the tasks, retrying.py says what is tried again. Pages are
published by training_progress.py through artifact_client.py; events.py sends an adapter's events.
prefect_server.py asks Prefect's server, and log_text.py escapes what logs show.
"""

from nested_core import backend
from tasks.log_text import escape_logs_of_runs

backend.prepare()  # a worker may import a task before anything else of ours
escape_logs_of_runs()
