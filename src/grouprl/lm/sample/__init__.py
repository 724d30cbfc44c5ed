"""Sampling completions: decoding groups of rows, and drawing tokens."""
