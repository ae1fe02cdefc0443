"""Training: from a loaded model and tokenised data to a run directory with checkpoints.

trainer.py is the loop, train_step.py one optimizer step, loss/ what it minimises; training_setup.py
makes what they need, schedule/ says which batch, evaluation and report belong to a step.
due_parts.py reports, evaluates and saves when it is due, training_state.py is what a checkpoint
records, early_stopping.py says when a run ends early, training_checks.py and nonfinite_watch.py
check that training does something. parameter_packing.py makes one vector of a tier's tensors,
parameter_importance.py measures which matter. reports/ is what a run tells, memory_plan.py how
much it may hold. world.py is where several processes would meet. Others use `trainer.Trainer`,
`training_setup.prepare_training` and `evaluation.Evaluator`.
"""
