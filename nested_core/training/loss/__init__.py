"""Losses, one module each: a step schedule has the one that it is made for.

loss_interface.py says what a loss declares; supervised_loss.py is the default, and
chunked_cross_entropy.py its form that computes few logits at a time, through the output head that
is found in a model.
"""
