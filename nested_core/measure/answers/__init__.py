"""Suites of questions with the answers expected, and what a model answers and scores on them.

suites.py reads a suite's file, scorers.py scores texts, and scoring_process.py is the program that
runs what a suite brings along. suite_answers.py has a model answer, answer_cache.py keeps the
answers of models that do not change from night to night, and answer_bounds.py holds answers
against their bounds.
"""
