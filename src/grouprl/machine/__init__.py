"""What both arenas ask of the computer: memory, a C compiler, and a process of its own."""
