"""The models: find and load a base model, attach an adapter, and generate answers.

base_model.py finds and loads the base, base_modules.py opens one without its weights, and
lora_attachment.py makes an adapter trainable. adapter_fit.py checks that an adapter fits its
settings and base. parameters.py refers to trainable parameters by name, lora_tensors.py names the
tensors of an adapter, and adapter_formats.py is the interface of rooms that know other programs'
adapters. generation.py generates answers and chat_template.py renders chats. session.py attaches
adapters to a base that stays loaded from step to step of a run.
"""
