"""vLLM in the place of the built-in sampler: in this process, or as a server."""
