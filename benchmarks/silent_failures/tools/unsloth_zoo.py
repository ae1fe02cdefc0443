"""unsloth-zoo's MLX trainer, which does not begin on Linux."""

from __future__ import annotations

from benchmarks.silent_failures.tools.tool import Tool


class UnslothZoo(Tool):
    """It installs on Linux (`unsloth_zoo[mlx]` with `mlx[cpu]`), and no step of it runs there."""

    name = "unsloth-zoo"
    checks = "none, for nothing of it begins"
    packages = ("unsloth_zoo", "mlx", "mlx-lm")
    does_not_begin = (
        "its MLX trainer is for macOS on arm64, which `unsloth_zoo.mlx.runtime.is_mlx_available` "
        "asks for; on Linux `import unsloth_zoo.mlx.trainer` ends with `ImportError: Please "
        "install Unsloth via pip install unsloth!`, whose trainer is PyTorch's"
    )
