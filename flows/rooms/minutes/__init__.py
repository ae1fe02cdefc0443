"""What the room minutes adds to the commands `train`, `run` and `explain`."""
