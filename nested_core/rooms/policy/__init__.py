"""The command that sets what an automatic promotion of a name needs; the registry obeys it."""
