"""What the room `reference` adds to the command line: `train --log mlx_lm`."""
