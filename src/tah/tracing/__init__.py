"""What each pass predicts for every token of some texts: traces, their statistics, thresholds, and the depth lens.
Start at `trace.py`."""
