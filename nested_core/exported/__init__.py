"""Whether an exported model does what its adapter does, by what a fresh process reads of it.

reference.py measures the base and the adapter, artefact_reader.py is the program that reads the
artefact alone, fresh_reading.py starts it, and judgement.py compares the two.
"""
