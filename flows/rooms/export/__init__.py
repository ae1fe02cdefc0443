"""What the room `export` adds to the command line."""
