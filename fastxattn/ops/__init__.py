"""One room per operation; every room has the same file names."""
