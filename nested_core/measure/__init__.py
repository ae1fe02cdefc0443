"""What any model or adapter computes: losses and answers, for the gate, rooms and training.

losses/ measures held-out examples, answers/ asks suites of questions, and fresh_process/ has a new
process read models from their files alone. How many logits are in memory at a time says
nested_core/training/loss/logit_budget.py.
"""
