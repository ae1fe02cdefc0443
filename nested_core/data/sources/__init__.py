"""Where a data set comes from: files of several formats, or the Hugging Face hub.

split_files.open_splits returns each split as a file of JSON lines, the only format that the rest
reads; file_formats.py converts other files to it, the room hub data sets of the hub.
"""
