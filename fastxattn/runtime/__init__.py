"""What every operation needs at run time: backend choice, the compiled libraries, environment settings."""
