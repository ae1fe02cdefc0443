"""What a run tells while it trains, and how it is read again: metrics, plan, samples, services.

metrics_file.py and training_plan.py own metrics.jsonl and plan.json, and word what is in them;
sample_prompts.py answers `samples`, reporting_services.py sends reports to the services of
`report_to`. Nothing here knows the trainer.
"""
