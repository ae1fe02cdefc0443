"""Gated delta nets in chunks (gated_delta.py); their convolutions are short_convolution.py."""
