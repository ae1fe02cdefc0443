"""Optimizers with tiers: groups of parameters that are updated at different frequencies.

tiered.py has the optimizers, tiers.py gives each parameter its tier, schedules.py makes the
learning rate of a run, named_updates.py puts updates into a model by name and reads them back.
clock.py and gradient_checks.py are parts of the optimizers: tiers with their counters, and
gradients that are checked, measured and clipped.
"""
