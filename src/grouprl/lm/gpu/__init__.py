"""Triton kernels for GPUs, and what calls them; `kernels` is imported only where they are wanted."""
