"""Training in processes of its own: how they are started, followed and ended.

mlx_launch.py makes the command, rank_group.py follows the processes with a trainer's methods. Two
programs of their own are started by path: launcher_program.py runs mlx.launch without its busy
loop, and end_with_parent.py ends all processes when the one that started them is gone.
restarting.py is the small parent that begins a command again where it is killed.
first_kernels.py has other processes compile a machine's first CUDA kernels.
"""
