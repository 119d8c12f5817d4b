"""Rows of text as tokens, the tokens that an assistant is trained to produce, and how hard each token is."""
