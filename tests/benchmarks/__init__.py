"""How fast, measured so that anyone can repeat it: `python -m tests.benchmarks`."""
