"""The proof: a new process that loads base and adapter with plain mlx_lm and must see the change.

fresh_process_check.py sends the requests (the program is in nested_core/measure/fresh_process) and
judges the logits. proof_of_run.py starts the process while the gate still measures. canary.py
records the answers that a server must reproduce before it serves the adapter.
"""
