"""A fine-tune from data to champion, one step after the other.

finetune.py is the sequence, steps.py each step from disk to disk, publishing.py what is registered
and continual.py going on from the champion. device_lock.py keeps a GPU to one run at a time;
launch/ and rank_worker.py train in several processes.
"""
