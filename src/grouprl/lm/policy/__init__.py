"""The policy: the model in training, its log-probabilities and its reference model."""
