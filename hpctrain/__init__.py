"""hpctrain: trains ImageNet-class Keras models with huge batches on supercomputers.

Importing the package imports nothing else: TensorFlow, Keras, Horovod and HDF5 are loaded where they are used.
"""

__version__ = "0.1.0"
