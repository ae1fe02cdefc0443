"""Suites of questions with expected answers, and how well a model answers them.

suites.py reads a suite's file, scorers.py scores texts. suite_answers.py makes a model answer,
answer_cache.py keeps the answers of models that do not change from night to night, and
answer_bounds.py compares the scores with the bounds of the gate.
"""
