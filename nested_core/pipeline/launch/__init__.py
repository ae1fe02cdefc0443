"""Processes beside the one that trains.

restarting.py is the small parent that begins a command again where it is killed. first_kernels.py
has other processes compile a machine's first CUDA kernels.
"""
