"""A run whose length is said in minutes: `training.minutes`, or `--minutes`.

forecast.py measures a few steps and a short answer, and says how many steps fit with their
evaluations and the verdict. timed_training.py fixes the steps of a run by it, and ends the run when
its time is over, by the stop that everybody else uses. sizes.py says for `explain` what fits in
how many minutes.
"""
