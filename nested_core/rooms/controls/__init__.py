"""Controls: comparisons that show failures for which there is no rule of their own."""
