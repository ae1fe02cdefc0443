"""What the room `evaluate` adds to the command line."""
