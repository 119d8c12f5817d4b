"""From rows to a trained model: labels, pruning, both stages. Start at `train.py`."""
