"""A run, or several, as a person reads them: a page, a table, a list.

Reads what runs and registries keep on disk, and changes nothing of it. run_outcome.py says what
became of a run, run_page.py is report.html, run_comparison.py several runs beside each other.
"""
