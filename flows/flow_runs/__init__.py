"""What flow runs share: their steps, names and messages, and what they may touch.

prefect_hooks.py runs the steps of a fine-tune as tasks, nights.py names a night's run,
prefect_logs.py is its words, allowed_folders.py what parameters may name.
watchers.py is where rooms take part.
"""
