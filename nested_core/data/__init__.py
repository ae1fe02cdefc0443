"""Data sets: read by line, judged by rules, tokenised as mlx-lm does, and cut into batches.

sources/ opens files of every format, lines/ reads them, rules/ judges what was read, tokens/ is
what training maps, batches.py puts rows together. dataset_loading.load_dataset is the way in, and
keeps its result; split_table.py reads all lines as tables, dataset_validation.py judges them.
data_settings.py is what a configuration says of data, held_out_rows.py reads held-out rows again,
example_digests.py knows examples again, and parallel_jobs.py uses all cores.
Nothing is imported here, so that naming one module does not load pandera, polars or mlx.
"""
