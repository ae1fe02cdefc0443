"""The commands of `nested-tune`: each module adds its own to the parser.

A command's function does the work and returns an exit code, or a function that prints the result
and returns it. Heavy imports wait until a command needs them; `train` never imports Prefect.
"""
