"""What the room tables adds to the command `init`."""
