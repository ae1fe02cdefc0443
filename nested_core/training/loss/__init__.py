"""Losses, one module each; a step schedule declares the loss that it trains with.

loss_interface.py defines what a loss is. cross_entropy.py is the default loss, whole or in chunks
through the model's output head, and logit_budget.py the number of logits that may exist at once.
"""
