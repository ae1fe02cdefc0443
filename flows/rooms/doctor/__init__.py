"""What the room `doctor` adds to the command line."""
