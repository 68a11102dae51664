"""One seed per layer, from the model's seed and the layer's name alone.

So the initial weights do not depend on what the process built before, on Keras's global seed, or on the order in
which layers are made: adding a layer leaves the others' weights as they were.
"""

import hashlib


def layer_seed(seed: int, layer_name: str) -> int:
    """Return the seed of a layer: 31 bits of SHA-256 over `seed` and `layer_name`, the same on every machine.

    31 bits, because Keras folds a seed to int32 before TensorFlow's stateless generators see it.
    """
    digest = hashlib.sha256(f"{seed}/{layer_name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
