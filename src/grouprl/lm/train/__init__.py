"""The trainer in TRL's shape, its loop, its callbacks and its checkpoints."""
