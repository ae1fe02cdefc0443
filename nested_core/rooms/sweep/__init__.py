"""Sweeps: several settings tried in the time there is, and the best one judged.

arms.py makes the configuration of each setting and keeps sweep.json, search.py trains them and
drops the worse half at each rung, and choice.py compares the chosen one with luck counted.
"""
