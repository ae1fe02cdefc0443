"""A copy of a registry's versions and champion in MLflow's model registry."""
