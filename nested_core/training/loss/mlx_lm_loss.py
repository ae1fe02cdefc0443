"""The loss of mlx_lm.lora, which `training.reference: mlx_lm` trains with.

A micro-batch is (tokens, bounds): int32 (batch, length + 1), and (batch, 2) with the first target
and the length of each row (mlx_lm.tuner.trainer.default_loss, 0.32).
"""

from __future__ import annotations

from mlx_lm.tuner.trainer import default_loss

from nested_core.training.loss.loss_interface import Loss

MLX_LM_LOSS = Loss(default_loss, is_mean=True)
