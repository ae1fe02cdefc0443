"""The program of the process in which llama.cpp's own code stores a GGUF's matrices in fewer bits.

It imports nothing of this project.
"""

import ctypes
import os
from typing import Any


def answer(request: dict[str, Any]) -> None:
    """Write the GGUF `to`, with the matrices of the GGUF `from` in the format `type`.

    `type` is a number of the enum llama_ftype of llama.h.
    """
    import llama_cpp.llama_cpp as api

    given = api.llama_model_quantize_default_params()
    given.ftype, given.nthread = request["type"], os.cpu_count() or 1
    files = (request[name].encode() for name in ("from", "to"))
    if (code := api.llama_model_quantize(*files, ctypes.byref(given))) != 0:
        raise RuntimeError(f"llama_model_quantize returned {code}")
