"""From a planned module to files that a runtime takes, and back into that runtime."""
