"""Asks a person on Prefect's server whether a version is to be the champion.

questions.py starts the run of promote/auto that asks, does what that run does until the person has
answered, and records the answer.
"""
