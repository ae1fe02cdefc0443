"""Which batch, evaluation and report belong to a step (step_schedule.py)."""
