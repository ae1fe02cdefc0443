"""What the room `peft` adds to the command line."""
