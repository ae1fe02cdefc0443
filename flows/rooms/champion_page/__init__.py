"""The room `champion_page` on a Prefect server: the page, and lineage as assets (page.py)."""
