"""This process: its signals, its user and files, its own Prefect server, errors of the system.

stop_signals.py, environment.py, local_server.py and os_errors.py, in this order.
"""
