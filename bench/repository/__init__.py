"""What this repository does with the benchmarks: its suite, its README, its run on a GPU. Not installed."""
