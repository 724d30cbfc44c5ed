"""The Llama family, faster. Nothing here is needed: without it, the model's own layers run."""
