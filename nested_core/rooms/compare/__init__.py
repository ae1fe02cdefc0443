"""Several runs beside each other (comparison.py)."""
