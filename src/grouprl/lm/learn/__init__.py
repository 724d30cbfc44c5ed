"""From samples to better weights: the loss, the gradient, the optimizer step."""
