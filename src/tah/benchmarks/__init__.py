"""The cost of iterating, as ratios to the base: generation (`bench.py`), training, tracing, serving."""
