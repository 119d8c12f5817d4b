"""Benchmarks through lm-evaluation-harness, and the sandbox that runs generated code. Start at `evaluate.py`."""
