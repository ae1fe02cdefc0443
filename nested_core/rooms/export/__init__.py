"""Export: an adapter with its base as one model, kept only where it does what the adapter does.

exporting.py is `nested_core.export`. fusing.py puts the adapter into the weights, gguf/ writes and
reads files for llama.cpp. asked.py chooses what base, adapter and artefact are asked,
and has fresh processes answer, llama_cpp_program.py is llama.cpp there, and judgement.py compares
the answers. served_as.py writes what programs read beside a GGUF, and asks llama-server.
export_record.py is export.json with its card, and named_artefact.py finds what is exported for
`evaluate`. adapter_card.py is the model card of a
version, which is uploaded with an adapter.
"""
