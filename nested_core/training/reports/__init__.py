"""What a run tells while it trains: samples and services; records/ has its metrics and plan.

sample_prompts.py answers `samples`, reporting_services.py sends reports to the services of
`report_to`. Nothing here knows the trainer.
"""
