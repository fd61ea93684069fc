"""A recorded step on the CPU: calls of NumPy or torch, and loops in C between them."""
