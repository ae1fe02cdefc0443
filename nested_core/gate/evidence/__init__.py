"""What a run and the registry recorded: digests, updates of tiers, metrics, training sets."""
