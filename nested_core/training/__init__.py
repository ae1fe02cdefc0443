"""Training: the loss, the schedule, one compiled step for each set of due tiers, and the loop."""
