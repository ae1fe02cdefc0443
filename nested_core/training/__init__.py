"""Training: from a loaded model and tokenised data to a run directory with checkpoints.

trainer.py is the loop, step.py one optimizer step, loss/ what it minimises; setup.py makes what
they need, step_schedule.py chooses the batches. recorder.py writes metrics and checkpoints,
health.py and divergence.py check that it does something, memory/ predicts its peak. Others use
`trainer.Trainer`, `setup.prepare_training`, `evaluation.Evaluator`, `metrics.read_metrics` and
`distributed.join`.
"""
