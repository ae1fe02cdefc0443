"""The models: the base is found and loaded, an adapter attached to it, and both are asked.

base_model.py finds and loads the base, lora_attachment.py makes an adapter trainable.
parameters.py refers to trainable parameters by name, generation.py asks a model; peft/ converts
adapters from and for PEFT. kept_base.py attaches adapters to a base that stays loaded, session.py
keeps it from step to step of a run, and side_by_side.py answers as the base and as adapters of it.
"""
