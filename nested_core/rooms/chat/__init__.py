"""Chat: its code is flows/rooms/chat; models/side_by_side.py of the core answers."""
