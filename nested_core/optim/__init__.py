"""Optimizers with tiers: groups of parameters that are updated at different frequencies.

tiered.py has the optimizers; tier_assignment.py assigns each parameter to a tier; tiers_file.py
reads the tiers of a run; learning_rate_schedules.py builds the learning rate of a run;
named_updates.py puts updates into a model by name and reads them back. tier_counters.py (tiers with
their counters) and gradients.py are parts of the optimizers.
"""
