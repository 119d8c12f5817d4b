"""Bootstrap intervals, and thresholds for a share of tokens."""
