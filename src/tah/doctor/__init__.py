"""`tah doctor`: whether this machine computes TaH correctly, and how fast."""
