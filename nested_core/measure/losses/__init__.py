"""Losses on held-out examples: measured, compared in pairs, and checked against the gate's bounds.

held_out_loss.py measures losses, prediction_comparison.py compares the predictions of several
adapters, loss_figures.py computes the verdict's figures, and left_out_examples.py finds the
examples to leave out. chosen_candidate.py corrects for a candidate that was selected on the same
examples.
"""
