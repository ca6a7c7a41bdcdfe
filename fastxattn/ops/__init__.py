"""One package per operation; every package has the same file names."""
