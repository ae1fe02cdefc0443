"""Training: from a loaded model and tokenised data to a run directory with checkpoints.

trainer.py has the loop, train_step.py one optimizer step, and loss/ the losses; training_setup.py
builds what they need, and schedule/ decides which batch, evaluation and report belong to a step.
due_parts.py reports, evaluates and saves when due, training_state.py defines what a checkpoint
records. training_checks.py and nonfinite_watch.py check
that training has an effect. parameter_packing.py joins a tier's tensors to one vector,
parameter_importance.py measures parameters by their gradients, reports/ shows progress,
memory_plan.py limits the memory, and world.py is the interface for several processes. Other
packages use `trainer.Trainer`, `training_setup.prepare_training` and `evaluation.Evaluator`.
"""
