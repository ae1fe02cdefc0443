"""Losses by name. To add one, write a module that declares a `Loss`, and register it here.

loss_interface.py says what a loss declares; supervised_loss.py is the default,
chunked_cross_entropy.py its form that computes few logits at a time, through the output head that
is found in a model; mlx_lm_loss.py is the loss of mlx_lm.lora. A step schedule names its loss.
"""

from nested_core.training.loss.loss_interface import Loss
from nested_core.training.loss.mlx_lm_loss import MLX_LM_LOSS
from nested_core.training.loss.supervised_loss import SUPERVISED_LOSS

LOSSES: dict[str, Loss] = {"supervised": SUPERVISED_LOSS, "mlx_lm": MLX_LM_LOSS}
