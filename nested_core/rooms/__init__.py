"""Rooms: capabilities that can be deleted, each a folder with its code and ROOM.toml.

No file of the core imports a room. What a room has of commands is in flows/rooms, its tests are in
tests/rooms.
"""
