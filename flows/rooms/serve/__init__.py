"""What the room `serve` adds to the command line."""
