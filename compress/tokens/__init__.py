"""Token reduction: `techniques` decide, `reduction` executes, `surgery` puts it into a model."""
