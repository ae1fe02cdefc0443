"""A registry that other machines read from object storage, and data sets that lie there.

object_storage.py is the client; mirror_layout.py what a mirror holds; author.py puts it there;
reader.py keeps a local copy that is read as a registry; bucket_data.py fetches data sets.
"""
