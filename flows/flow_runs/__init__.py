"""What flow runs share: their steps, names and messages, what they may touch, ask and warn of.

prefect_hooks.py runs the steps of a fine-tune as tasks, nights.py names a night's run,
loss_on_test_set.py and prefect_logs.py are its words, allowed_folders.py what parameters may name.
approvals.py asks a person, and watchers.py is where rooms take part.
"""
