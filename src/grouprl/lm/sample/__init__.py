"""Sampling completions: decode steps of many rows, and the draw of each token."""
