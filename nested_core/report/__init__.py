"""A run as a person reads it: a page, a table, a row of a list.

Reads what runs and registries keep on disk, by records/run.py; pruning.py alone removes, and only
run folders. Each page is a document (text/document.py): run_report.py is report.html; champion.py
and curves.py are Prefect's. outcome.py says what became of a run.
"""
