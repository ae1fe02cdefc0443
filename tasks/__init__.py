"""One retryable step each: a thin wrapper with a retry policy, log lines and an artifact."""
