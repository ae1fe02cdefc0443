"""What trainers notice of thirty-five failures of a fine-tuning that nothing tells of.

`python -m benchmarks.silent_failures` plants each failure of failures.toml in a folder beside its
healthy twin, runs a tool on both as its own documentation says, and writes down what the tool
noticed, and when. A second list, preferences.toml, has five failures of training on preferences.
"""
