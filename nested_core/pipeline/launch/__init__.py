"""Training in several processes: how they are started, followed and ended.

mlx_launch.py makes the command, rank_group.py follows the processes with a trainer's methods, and
watchdog.py, a program of its own, ends them when the process that started them is gone.
"""
