"""Parameter lists, how they lie on many GPUs, and the bytes that a step moves of them."""
