"""Training: from a loaded model and tokenised data to a run directory with checkpoints.

trainer.py is the loop, train_step.py one optimizer step, loss/ what it minimises; training_setup.py
makes what they need, schedule/ says which batch, evaluation and report belong to a step.
run_recorder.py writes metrics and checkpoints, training_checks.py checks that training does
something, reports/ is what a run tells, memory/ predicts its peak. Others use
`trainer.Trainer`, `training_setup.prepare_training`, `evaluation.Evaluator` and
`rank_communication.join_ranks`.
"""
