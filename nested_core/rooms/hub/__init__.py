"""Data sets of the Hugging Face hub as lines of JSON (hub_datasets.py)."""
