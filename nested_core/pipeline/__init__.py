"""A fine-tune from data to champion, one step after the other.

finetune.py is the sequence; hooks.py what its caller may override; steps.py each step from disk to
disk; preflight.py the checks before the first one; publishing.py the registration; continual.py the
start from the champion. device_lock.py keeps a GPU to one run at a time; processes.py asks rooms
for training in several processes, and for `report_to`.

Beside it: named_adapters.py and named_models.py find what a person names.
"""
