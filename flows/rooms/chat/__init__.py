"""What the room `chat` adds to the command line."""
