"""The embedded experiment, recipes `tiny`, `tiny-paper`, `tiny-lookahead` and `tiny-tah2`: data, baselines and report."""
