"""Parsing and comparing answers: letters, mathematical expressions, programs. `evaluation/answers.py` grades them."""
