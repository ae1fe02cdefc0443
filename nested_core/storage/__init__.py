"""What is on disk: written atomically, read as if its author meant harm.

`atomic` and `manifest` write and hash; `strict_files` and `safetensors_files` read files of unknown
origin; `adapter`, `checkpoint` and `run_directory` are the folders made of them. `compiled_kernels`
keeps what MLX has compiled; `main_memory` bounds what is read at once.
"""
