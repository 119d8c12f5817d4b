"""A recipe from start to finish: its steps, what they leave, and the report. Start at `run.py`."""
