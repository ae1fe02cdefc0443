"""What the room `housekeeping` adds to the command line and to the deployments."""
