"""What the room `policy` adds to the command line."""
