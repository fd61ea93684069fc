"""A recorded step on a CUDA device: kernels, and the graph of their launches."""
