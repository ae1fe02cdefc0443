"""What a run tells while it trains; records/ has its metrics and its plan.

sample_prompts.py answers `samples`, training_callback.py is what a report is handed to, and
run_progress.py reads a run that goes on. Nothing here knows the trainer.
"""
