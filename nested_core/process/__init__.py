"""Child processes of this project: child.py has `Child`, which starts one and sends it requests.

child_main.py is the program that answers them. Data workers, the proof's fresh process, the scorers
of suites, the workers that compile kernels, and the notifier of a Prefect server are such
processes. command_parent.py connects a training command with its small parent, current_user.py
returns the name of the user, and our_packages.py has a process import our packages and no others of
their names.
"""
