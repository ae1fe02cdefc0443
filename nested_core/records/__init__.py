"""The files of a run and a registry that several rooms read: one module a file.

Each has the file's types, its strict reader and writer, and its words: plan.py, dataset.py,
metrics.py, skip.py, result.py, losses.py, answers.py, and for gate.json verdict.py and
verdict_file.py. Nobody else reads or writes these files, or turns one into a dictionary on the way.

run_status.py is a run as a whole, and its state: `Run` reads each file once, when it is asked for.
verdict_table.py is a verdict as rows that every page shows, outcome_names.py names what becomes of
a run, paired_difference.py is the interval of a difference, and loss_conclusion.py what it shows.
"""
