"""Reports of a run while it trains; its metrics and its plan are in records/.

sample_prompts.py answers `samples`, training_callback.py defines the callback that receives
reports, and run_progress.py reads the progress of a run from disk. Nothing here imports the
trainer.
"""
