"""What flow runs share: their names and messages, what they may touch, ask and warn of."""
