"""A fresh process that reads models from their files, as any user's process would.

starting.py starts it, mlx_lm_program.py is its program, and questions.py computes the answer to a
request for one model. None of the code in the process imports this project.
"""
