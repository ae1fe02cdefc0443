"""Nights that do not forget: earlier examples in training, earlier held-out rows in the gate.

replay_sources.py reads what earlier versions were trained on, replayed_examples.py chooses of it,
and replay_record.py is the file that says what was chosen. replayed_batches.py says
which comes when and mixes them into batches; replayed_run.py is all of this for one run, as the
core asks for it, and says whether the run goes on from the champion or is rebuilt.
ancestor_examples.py chooses what ancestors held out, gate_check.py judges by it and holds a rebuilt
run against the champion, and page.py is the part of a run's page.
"""
