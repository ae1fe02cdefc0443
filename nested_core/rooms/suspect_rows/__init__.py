"""Warnings about rows that look wrong although each of them can be trained on.

text_checks.py judges texts as they are read, tokenizer_checks.py texts with the base's tokenizer.
"""
