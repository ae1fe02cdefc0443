"""Where a data set comes from: files of several formats, or the Hugging Face hub.

split_files.open_splits gives each split as a file of JSON lines, which everything else reads;
file_formats.py makes these lines of other files, the room hub of data sets of the hub.
"""
