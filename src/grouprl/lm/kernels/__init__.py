"""Fast functions of tensors, in C for CPUs and in Triton for GPUs. They know nothing about models."""
