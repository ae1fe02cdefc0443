"""Sweeps: several settings tried in the time there is, and the best one judged.

search.py makes the configuration of each setting, trains them, drops the worse half at each rung
and compares the chosen one with luck counted; sweep.json keeps how far each got.
"""
