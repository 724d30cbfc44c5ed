"""What the configurations of both arenas share."""
