"""What the room `planning` adds to the command line: `init` and `explain`."""
