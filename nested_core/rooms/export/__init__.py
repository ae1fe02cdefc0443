"""Export: an adapter with its base as one model, kept only where it does what the adapter does.

exporting.py is `nested_core.export`. fusing.py puts the adapter into the weights, gguf/ writes and
reads files for llama.cpp. asked.py chooses what base, adapter and artefact are asked,
fresh_reading.py has fresh processes answer, llama_cpp_program.py is what reads a GGUF there, and
judgement.py compares the answers. export_record.py is export.json with its card, and
named_artefact.py finds what is exported for `evaluate`. adapter_card.py is the model card of a
version, which is uploaded with an adapter.
"""
