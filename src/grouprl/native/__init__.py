"""C that is compiled where it runs; each arena has sources of its own."""
