"""Where the launches of a step run: Triton on a GPU, numba on a CPU, plain torch anywhere."""
