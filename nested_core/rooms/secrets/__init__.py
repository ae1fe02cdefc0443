"""Likely secrets and personal data in a data set: patterns (sensitive_data.py) and their rules."""
