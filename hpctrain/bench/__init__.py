"""Benchmarks of the parts of a training job, on the machine and the data at hand."""
