"""Random problems, sanitizers, killed processes and broken files, for as long as one likes: ``make soak``."""
