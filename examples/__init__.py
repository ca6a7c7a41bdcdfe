"""Scripts; tests and benchmarks import some of their functions."""
