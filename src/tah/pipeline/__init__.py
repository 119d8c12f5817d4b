"""The steps of a recipe, from its data to a checkpoint and a report. Start at `run.py`."""
