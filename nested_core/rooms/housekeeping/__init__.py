"""Old runs and versions go, a registry is audited, and housekeeping does it for one adapter."""
