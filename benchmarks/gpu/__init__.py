"""Training on one GPU against mlx_lm.lora's own loop and PEFT, on random weights of real shapes."""
