"""Which adapter answers more fresh questions: mlx_lm.lora's, or what `init` and `train` make."""
