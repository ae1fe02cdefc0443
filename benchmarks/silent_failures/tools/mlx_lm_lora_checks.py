"""Calls the checks of mlx-lm-lora's MCP server, as its README says to do before a training.

python mlx_lm_lora_checks.py CONFIG.yaml, in an environment that has mlx-lm-lora[mcp].
"""

# mypy: ignore-errors

import asyncio
import json
import os
import sys
from pathlib import Path

import yaml
from mcp import Client, StdioServerParameters

ARGUMENTS = (
    *("model", "data", "train_mode", "train_type", "iters", "batch_size", "learning_rate"),
    *("num_layers", "max_seq_length"),
)


async def check(config):
    """Print what each check says; whether one of them ended with an error."""
    arguments = {key: config[key] for key in ARGUMENTS}
    others = {key: value for key, value in config.items() if key not in {*ARGUMENTS, "train"}}
    extra = json.dumps(others)
    data = {key: arguments[key] for key in ("data", "model", "train_mode")}
    server = StdioServerParameters(
        command=str(Path(sys.executable).with_name("mlx-lm-lora-mcp")), env=dict(os.environ)
    )
    failed = False
    async with Client(server) as client:
        for name, given in (
            ("validate_model_support", {"model": config["model"]}),
            ("inspect_dataset", {**data, "extra_config": extra}),
            ("check_training_config", {**arguments, "extra_config": extra}),
        ):
            result = await client.call_tool(name, given)
            print(name, *(part.text for part in result.content), sep="\n", flush=True)
            failed |= bool(result.is_error)
    return failed


if __name__ == "__main__":
    asked = yaml.safe_load(Path(sys.argv[1]).read_text("utf-8"))
    sys.exit(asyncio.run(check(asked)))
