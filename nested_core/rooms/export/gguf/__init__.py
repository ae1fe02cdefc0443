"""GGUF, the file that llama.cpp reads: written of an mlx model, and read back as a model's folder.

families.py has what llama.cpp's architectures ask for, vocabulary.py a tokenizer as GGUF stores it,
writing.py writes a file, and reading.py makes a folder of one that mlx_lm loads.
"""

from nested_core.rooms.export.gguf.reading import is_gguf, unpack_gguf
from nested_core.rooms.export.gguf.writing import Quantization, write_gguf

__all__ = ["Quantization", "is_gguf", "unpack_gguf", "write_gguf"]
