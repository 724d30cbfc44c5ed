"""Compiled inner loops for CPUs, with the same results as the torch operations they stand for."""
