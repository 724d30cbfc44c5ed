"""What both arenas ask of the computer: memory, and a C compiler."""
