"""Asks a person on Prefect's server whether a version is to be the champion.

questions.py starts a run of promote/auto, which publishes the question, suspends until the person
has answered, and records the answer.
"""
