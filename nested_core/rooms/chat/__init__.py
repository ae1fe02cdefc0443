"""Chat: side_by_side.py answers as a base and adapters of it; flows/rooms/chat is the command."""
