"""The files of a run and a registry that several rooms read: one module a file.

Each has the file's types, its strict reader and writer, and its words. Nobody else reads or writes
these files, or turns one into a dictionary on the way.
"""
