"""What the room `compare` adds to the command line."""
