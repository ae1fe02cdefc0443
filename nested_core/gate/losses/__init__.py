"""Losses on held-out examples: measured, compared in pairs, and held against the bounds.

held_out_loss.py measures, prediction_comparison.py compares what several adapters predict,
loss_figures.py makes the verdict's figures of it, and left_out_examples.py says which examples are
left out. champion_adapter.py has the champion of that moment, and chosen_candidate.py what a choice
on the same examples costs.
"""
