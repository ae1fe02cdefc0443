"""Losses and answers of any model or adapter, for the gate, rooms and training.

losses/ measures losses on held-out examples, answers/ asks suites of questions, and fresh_process/
starts a new process that reads models from their files alone. The number of logits in memory at a
time is limited by nested_core/training/loss/logit_budget.py.
"""
