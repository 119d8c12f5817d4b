"""From data to a trained model: labels, pruning, both stages, recipes, the chain of `tah run`. Start at `train.py`."""
