"""The models: `base_model` finds and loads the base, `lora_attachment` makes an adapter trainable.

`parameters` refers to trainable parameters by name, `generation` asks a model; `peft` converts
adapters from and for PEFT.
"""
