"""What the room `housekeeping` adds to the command line, to `doctor` and to the deployments."""
