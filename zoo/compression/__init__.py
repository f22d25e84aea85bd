"""From a dense model to a compressed one: calibrate, solve, allocate, fold."""
