"""Quality, speed and memory, side by side: evaluations, benchmarks, sweeps and their tables."""
