"""A run, or several, as a person reads them: a page, a table, a list.

Reads what runs and registries keep on disk, and changes nothing of it. Each page is a document
(text/document.py): run_report.py is report.html, comparison.py several runs beside each other,
nights.py, champion.py, approval.py and curves.py Prefect's. outcome.py says what became of a run.
"""
