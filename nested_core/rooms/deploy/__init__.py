"""Deployments on a Prefect server; all of its code is in flows/rooms/deploy."""
