"""GGUF, the file that llama.cpp reads: written of an mlx model, and read back as a model's folder.

families.py has what llama.cpp's architectures ask for, vocabulary.py a tokenizer as GGUF stores it,
and gguf_file.py writes a file, and makes a folder of one that mlx_lm loads.
"""
