"""What every pass makes of every token of a text: traces, their statistics, thresholds, the depth lens. Start at
`trace.py`."""
