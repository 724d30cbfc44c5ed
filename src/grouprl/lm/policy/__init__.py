"""The model as it samples, as it is differentiated, and as it was: the reference."""
