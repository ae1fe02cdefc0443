"""Work pools, deployments, automations and alerts on a Prefect server, and what `doctor` sees.

planned_deployments.py fills the data of deployments/ in for one adapter, deploy.py puts it on the
server, and alerts.py the automations, for whoever the alerts tell. server_checks.py asks a server
what `doctor` reports, each line a Check of flows/commands/check.py.
"""
