"""The training loop, evaluation, checkpoints, preemption and metrics."""
