"""Language models: finding, loading and saving them."""
