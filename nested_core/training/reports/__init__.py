"""What a run tells while it trains; records/ has its metrics and its plan.

sample_prompts.py answers `samples`, reporting_services.py sends reports to the services of
`report_to`, and run_progress.py reads a run that goes on. Nothing here knows the trainer.
"""
