"""What the room `audit` adds to the command line: `verify ADAPTER... --model BASE`."""
