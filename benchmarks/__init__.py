"""rnnkit's benchmarks: `python -m benchmarks` measures, `python -m benchmarks.report` tells the README."""
