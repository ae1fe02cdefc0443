"""What the room `mlflow` adds to the command line."""
