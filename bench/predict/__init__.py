"""What a step costs on paper, and what its kernels take of a GPU."""
