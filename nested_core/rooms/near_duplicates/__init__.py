"""Held-out rows that nearly are a row of train.

word_ngrams.py hashes sequences of words, and pairs rows that share enough of them.
"""
