"""A fresh process that reads models from their files as any user's would, and what it computes.

mlx_lm_program.py is its program, questions.py what it is asked of each model, and starting.py
starts it. None of what the process runs imports this project.
"""
