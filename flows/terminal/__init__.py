"""What a person sees in a terminal: progress, tables, a run while it goes on, and its results."""
