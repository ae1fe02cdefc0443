"""Asks a person on Prefect's server whether a version is to be the champion.

questions.py starts the run of promote/auto that asks, asking.py is what that run does until the
person has answered, answer_tasks.py records the answer.
"""
