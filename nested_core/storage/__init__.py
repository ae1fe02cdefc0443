"""What is on disk: written atomically, read as if its author meant harm.

atomic.py and manifest.py write and hash; untrusted_files.py and safetensors_files.py read files of
unknown origin; adapter.py, checkpoint.py, checkpoint_verification.py and run_directory.py are the
folders made of them, canary_file.py and validation_losses.py two files that more than one room
writes or reads. output_places.py says where a command may write, lock_file.py who writes now.
user_cache.py has what is kept for this user, kept_hashes.py among it; user_tmpdir.py is where
its temporary files lie, and main_memory.py bounds what is read at once.
"""
