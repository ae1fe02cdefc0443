"""Warnings about rows that look wrong although each of them can be trained on.

text_checks.py judges texts as they are read, rows_compared.py rows beside each other,
tokenizer_checks.py texts with the base's tokenizer. warnings.toml has words of the first two.
"""
