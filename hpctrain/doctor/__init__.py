"""`hpctrain doctor`: what is installed, how ranks are placed, how fast nodes are, and which one is unlike the rest.

Knows nothing of training and data. `node` needs neither MPI nor TensorFlow.
"""
