"""What the room `sweep` adds: its command, and a flow that tries a grid through deployments."""
