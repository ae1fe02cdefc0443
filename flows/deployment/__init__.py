"""Work pools, deployments, automations and alerts on a Prefect server, and what `doctor` sees."""
