"""The live view of a run; flows/rooms/live is all of it."""
