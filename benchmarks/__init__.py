"""Side-by-side measurements: each runs a named rival in the same go and prints a ratio."""
