"""SmolLM2-135M-Instruct, a model that people use, as a folder that mlx_lm loads: `make real-model`.

make_model.py makes the folder, make_reference.py wrote reference.json, which it is checked against.
"""
