"""What iterating costs, as ratios to the base: generation (`bench.py`), training, tracing, serving."""
