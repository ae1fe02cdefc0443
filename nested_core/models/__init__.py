"""The models: the base is found and loaded, an adapter attached to it, and both are asked.

base_model.py finds and loads the base, base_modules.py opens one without its weights, and
lora_attachment.py makes an adapter trainable. parameters.py refers to trainable parameters by name,
lora_tensors.py names the tensors of an adapter, adapter_formats.py is what a room offers that knows
adapters of another program, and generation.py asks a model. kept_base.py attaches adapters to a
base that stays loaded, session.py keeps it from step to step of a run, and side_by_side.py answers
as the base and as adapters of it.
"""
