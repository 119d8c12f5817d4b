"""The embedded experiment: data, baselines and report of the recipes whose names begin with `tiny`."""
