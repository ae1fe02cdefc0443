"""A run, or several, as a person reads them: a page, a table, a list.

Reads what runs and registries keep on disk, and changes nothing of it. run_record.py reads a run
whole and run_status.py its state; run_page.py is report.html, run_comparison.py several runs beside
each other and run_listing.py a folder of them.
"""
