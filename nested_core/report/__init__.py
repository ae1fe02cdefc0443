"""A run as a person reads it: a page, a table, a row of a list.

Reads what runs and registries keep on disk, by records/run_status.py. Each page is a document
(text/document.py): run_report.py is report.html, curves.py is Prefect's.
outcome.py says what became of a run.
"""
