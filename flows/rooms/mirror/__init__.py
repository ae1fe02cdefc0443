"""What the room `mirror` adds to the command line."""
