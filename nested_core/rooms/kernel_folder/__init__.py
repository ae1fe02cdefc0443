"""A private folder for the kernels that MLX compiles (compiled_kernels.py).

first_kernels.py has other processes, kernel_worker.py, compile a machine's first ones meanwhile.
"""
