"""Ranks: one training in several processes, on one machine or several, started by mlx.launch.

mlx_launch.py makes the arguments, rank_group.py follows the processes with a trainer's methods, and
rank_worker.py is the program of each. launcher_program.py, started by its path, runs mlx.launch
without its busy loop, and ends all processes when the one that started them is gone. rank_world.py
sums and compares over the ranks, and ends a rank that waits for the others for too long.
"""
