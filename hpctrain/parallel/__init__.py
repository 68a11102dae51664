"""The MPI and Horovod world: ranks, launch settings, allreduce of gradients. Knows nothing of training."""
