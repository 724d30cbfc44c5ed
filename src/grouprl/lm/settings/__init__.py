"""What a run is told: every setting, what goes together, and how TRL's options are read."""
