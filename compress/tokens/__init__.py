"""Token reduction: pure functions in `merging`, surgery on models in `surgery`."""
