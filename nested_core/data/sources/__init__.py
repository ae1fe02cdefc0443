"""Where a data set comes from: files of several formats, or the Hugging Face hub.

`split_files.open_splits` gives each split as a file of JSON lines, which everything else reads.
"""
