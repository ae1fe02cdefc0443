"""A person's own table made into a data set that trains as OpenAI's messages would.

data_files.py reads CSV, parquet, .xlsx and JSON arrays, source.py finds the rows,
labels.py the labels, chats.py makes chats of rows,
dataset_split.py draws held-out rows, eval_set.py questions of them, and data_set.py does all of it.
"""
