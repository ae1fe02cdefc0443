"""What a machine has and lacks; the command in flows/rooms/doctor is all of it."""
