"""The proof: a new process that loads base and adapter with plain mlx_lm and sees the change.

fresh_process_check.py asks it (nested_core/measure/fresh_process has the program), and
proof_of_run.py starts it while the gate measures. canary.py records what a server has to answer
with the adapter.
"""
