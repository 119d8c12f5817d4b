"""Answers as a grader reads them: letters, mathematical expressions, programs. `evaluation/answers.py` decides."""
