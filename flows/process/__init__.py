"""This process: its signals, its user and files, its own Prefect server, errors of the system."""
