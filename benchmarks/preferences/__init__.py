"""Preferences beside other trainers: TRL's losses as an oracle, and what is learnt on a GPU."""
