"""The embedded experiment, recipes `tiny` and `tiny-lookahead`: its data, baselines and report."""
