"""Replaces one function of a shared library when that is imported; SILENT_FAILURE says which.

Python imports this module at its start where the folder is on PYTHONPATH, so that a tool's own code
stays as it is. MAC_MEMORY gives a program the figure of memory that MLX has on a Mac alone: a
trainer that asks for it would end with a KeyError on Linux before its first step.
"""

# mypy: ignore-errors

import importlib.abc
import importlib.util
import os
import sys

import broken_preferences


def keep_parameters(module):
    """An optimizer that advances its moments, and gives the parameters back as they were."""
    apply_single = module.Adam.apply_single

    def computed_and_not_applied(self, gradient, parameter, state):
        apply_single(self, gradient, parameter, state)
        return parameter

    module.Adam.apply_single = computed_and_not_applied


def keep_torch_parameters(module):
    """The same for torch's AdamW."""
    step = module.AdamW.step

    def computed_and_not_applied(self, closure=None):
        import torch

        with torch.no_grad():
            held = [(p, p.clone()) for group in self.param_groups for p in group["params"]]
            loss = step(self, closure)
            for parameter, value in held:
                parameter.copy_(value)
        return loss

    module.AdamW.step = computed_and_not_applied


def fuse_nothing(module):
    """LoRA layers that fuse to their base's layer."""
    module.LoRALinear.fuse = lambda self, dequantize=False: self.linear


def order_of_the_folder(rows, heads):
    """Undo llama.cpp's order of the rows of q and k: pairs (2i, 2i + 1) become halves."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def is_rotated(name):
    """Whether a tensor of a GGUF is a q or k projection."""
    return "attn_q.weight" in name or "attn_k.weight" in name


def write_unpermuted(module):
    """gguf's writer, with q and k in the order of the folder."""
    writer = module.GGUFWriter
    add_info, write_data, add_uint32 = (
        writer.add_tensor_info,
        writer.write_tensor_data,
        writer.add_uint32,
    )

    def remember_name(self, name, *arguments, **named):
        self.__dict__.setdefault("names_to_come", []).append(name)
        return add_info(self, name, *arguments, **named)

    def remember_heads(self, key, value):
        if key.endswith("attention.head_count"):
            self.__dict__["heads"] = value
        return add_uint32(self, key, value)

    def write(self, tensor, *arguments, **named):
        name = self.__dict__["names_to_come"].pop(0)
        if is_rotated(name):
            tensor = order_of_the_folder(tensor, self.__dict__["heads"])
        return write_data(self, tensor, *arguments, **named)

    writer.add_tensor_info, writer.write_tensor_data, writer.add_uint32 = (
        remember_name,
        write,
        remember_heads,
    )


def save_unpermuted(module):
    """mlx's writer of GGUF, with q and k in the order of the folder."""
    save = module.save_gguf

    def save_gguf(file, arrays, metadata):
        heads = metadata["llama.attention.head_count"].item()
        turned = {
            name: order_of_the_folder(a, heads) if is_rotated(name) else a
            for name, a in arrays.items()
        }
        return save(file, turned, metadata)

    module.save_gguf = save_gguf


def tell_memory(module):
    """MLX's device_info with the memory in bytes that a Mac recommends to use."""
    device_info = module.device_info

    def with_memory(*arguments):
        return {"max_recommended_working_set_size": 8 << 30} | device_info(*arguments)

    module.device_info = with_memory


PATCHES = {
    "updates-not-applied": {
        "mlx.optimizers.optimizers": keep_parameters,
        "torch.optim.adamw": keep_torch_parameters,
    },
    "reference-is-the-trained-model": {
        "nested_core.rooms.preferences.reference_likelihoods": broken_preferences.read_trained
    },
    "mask-on-the-prompt": {
        "nested_core.rooms.preferences.answer_rows": broken_preferences.count_prompts
    },
    "fuse-leaves-it-out": {"mlx_lm.tuner.lora": fuse_nothing},
    "gguf-rotary-order": {
        "gguf.gguf_writer": write_unpermuted,
        "mlx_lm.gguf": lambda module: save_unpermuted(module.mx),
    },
}


class Patching(importlib.abc.MetaPathFinder):
    """Finds modules as ever, and patches those of `patches` once they are loaded."""

    def __init__(self, patches):
        self.patches = dict(patches)

    def find_spec(self, name, path, target=None):
        """The module's own specification, whose loader patches it."""
        patch = self.patches.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = execute_and_patch
        return spec


patches = dict(PATCHES.get(os.environ.get("SILENT_FAILURE", ""), {}))
if "MAC_MEMORY" in os.environ:
    patches["mlx.core"] = tell_memory
sys.meta_path.insert(0, Patching(patches))
