"""What moves the weights of any policy: all parameters as one vector, and one gradient step. Both arenas use it."""
