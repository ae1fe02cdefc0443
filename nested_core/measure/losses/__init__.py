"""Losses on held-out examples: measured, compared in pairs, and held against the bounds.

held_out_loss.py measures, prediction_comparison.py compares what several adapters predict,
loss_figures.py makes the verdict's figures of it, and left_out_examples.py says which examples are
left out. chosen_candidate.py has what a choice on the same examples costs.
"""
