"""Losses on held-out examples: measured, compared in pairs, and held against the bounds."""
