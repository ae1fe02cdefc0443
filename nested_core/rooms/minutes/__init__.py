"""A run whose length is said in minutes: `training.minutes`, or `--minutes`.

forecast.py tries a few steps, and says by them how many fit with their evaluations and the verdict.
timed_training.py trains as many, or cuts them in time. blas_threads.py chooses the threads of its
products.
"""
