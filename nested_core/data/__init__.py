"""Data sets: read line by line, checked by rules, tokenized as mlx-lm does, and cut into batches.

sources/ opens files of every format; lines/ parses them; rules/ checks what was read; tokens/ is
what training maps; batches.py groups rows. dataset_loading.load_dataset is the entry point, and
caches its result. split_table.py reads all lines as tables, and dataset_validation.py checks them.
data_settings.py is the configuration of data; held_out_rows.py reads held-out rows again;
example_digests.py identifies examples; parallel_jobs.py uses all cores.

Nothing is imported here, so that importing one module does not load pandera, polars or mlx.
"""
