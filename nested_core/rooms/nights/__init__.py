"""The nights of an adapter, as pages (night_pages.py).

champion_page.py is the page of its champion; fleet.py has the champion and the last change of every
name of a registry.
"""
