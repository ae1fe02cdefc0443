"""Sweeps: several settings tried in the time there is, and the best one judged.

points.py makes the configuration of each setting, search.py trains them and drops the worse half at
each rung, record.py is sweep.json, choice.py compares the chosen one with luck counted, and page.py
is what a person reads.
"""
