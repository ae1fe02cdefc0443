"""Losses, one module each; a step schedule declares the loss that it trains with.

loss_interface.py defines what a loss is, and finds a model's output head. supervised_loss.py is the
default loss, chunked_cross_entropy.py its form that computes few logits at a time, and
logit_budget.py the number of logits that may exist at once.
"""
