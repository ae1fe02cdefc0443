"""The nights of an adapter, as pages (night_pages.py) and as figures for Prometheus.

fleet.py has the champion and the last change of every name of a registry.
"""
