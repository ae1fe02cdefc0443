"""Data sets: read by line, judged by rules, tokenised as mlx-lm does, and cut into batches.

sources opens files of every format, lines reads them, rules judges what was read, tokens is what
training maps. dataset_loading.load_dataset is the way in, and keeps its result. Nothing is imported
here, so that naming one module does not load pandera, polars or mlx.
"""
