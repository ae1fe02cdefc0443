"""The nights and the champion of an adapter, as pages (pages.py).

fleet.py has the champion and the last change of every name of a registry.
"""
