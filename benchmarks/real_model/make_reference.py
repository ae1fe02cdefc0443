"""Write reference.json again: `python -m benchmarks.real_model.make_reference GGUF`.

Made by programs of others, which read the GGUF themselves: token ids by llama.cpp, logits by
transformers in float32. Needs xllamacpp, torch, transformers, accelerate, gguf and httpx, and
nothing of this project but the file itself, whose texts and messages stay.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import torch
import xllamacpp
from gguf import GGUFReader
from jinja2 import Template
from transformers import AutoModelForCausalLM

REFERENCE = Path(__file__).with_name("reference.json")
LIKELIEST = 20  # tokens whose logits are kept of each prompt


def main() -> None:
    """Compute all ids and logits of reference.json from the GGUF that the command line names."""
    gguf = Path(sys.argv[1])
    server = start_llama_cpp(gguf)
    template = Template(GGUFReader(gguf).fields["tokenizer.chat_template"].contents())
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    reference: dict[str, Any] = json.loads(REFERENCE.read_text(encoding="utf-8"))
    for text in reference["texts"]:
        text["ids"] = encode(server, text["text"])
    for prompt in reference["prompts"]:
        rendered = template.render(messages=prompt["messages"], add_generation_prompt=True)
        prompt["ids"] = encode(server, rendered)
        with torch.no_grad():
            logits = model(torch.tensor([prompt["ids"]])).logits[0, -1]
        values, tokens = torch.topk(logits, LIKELIEST)
        prompt["tokens"] = tokens.tolist()
        prompt["logits"] = [round(value, 3) for value in values.tolist()]
    texts = ",\n".join(map(json.dumps, reference["texts"]))
    prompts = ",\n".join(map(json.dumps, reference["prompts"]))
    REFERENCE.write_text(f'{{"texts": [\n{texts}\n],\n"prompts": [\n{prompts}\n]}}\n')


def start_llama_cpp(gguf: Path) -> Any:
    """llama.cpp's server with the model, in this process."""
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx = 256
    return xllamacpp.Server(params)


def encode(server: Any, text: str) -> list[int]:
    """llama.cpp's token ids of a text, the texts of control tokens read as those."""
    asked = {"content": text, "add_special": False, "parse_special": True}
    ids: list[int] = httpx.post(f"{server.listening_address}/tokenize", json=asked).json()["tokens"]
    return ids


if __name__ == "__main__":
    main()
