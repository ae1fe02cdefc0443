"""Evaluations: what models answer and predict, side by side, without training.

evaluating.py asks and measures with the gate's own functions, page.py has the figures, as rows, a
page and a terminal's lines.
"""
