"""Scores by what comes with a suite: suite_scorers.py asks the process of scoring_process.py."""
