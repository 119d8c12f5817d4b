"""Bootstrap intervals, thresholds for a share of tokens, and charts."""
