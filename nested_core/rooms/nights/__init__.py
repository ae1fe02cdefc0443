"""The nights of an adapter, as pages (night_pages.py) and as figures for Prometheus."""
