"""Traces (what each pass predicts for every token of some texts), their statistics, threshold tuning, the depth lens.

Start at `trace.py`.
"""
