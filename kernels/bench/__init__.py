"""What a rented GPU measures in a few minutes: `python -m eigenzoo.kernels.bench`."""
