"""One retryable step each: a thin wrapper with a retry policy, log lines and an artifact."""

from nested_core import backend
from tasks.log_text import escape_logs_of_runs

backend.prepare()  # a worker may import a task before anything else of ours
escape_logs_of_runs()
