"""How long each tier setting takes to mlx_lm.lora's final validation loss, on models made here."""
