"""Processes of ours that answer requests: child.py has `Child`, which starts and asks one.

child_main.py is the program that answers. Workers on all cores, the proof's fresh process, scorers
of suites, the workers that compile kernels, and what tells Prefect of a server are of this kind.
command_parent.py tells the parent of a command that trains how far it is, and ends with it.
current_user.py says whose process this one is.
"""
