"""Triton kernels for GPUs; nothing here is imported unless there is one."""
