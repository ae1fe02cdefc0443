"""Before a run: suggested_config.py writes a configuration, explanation.py words what it does."""
