"""A TensorFlow operation of our own for what the input pipeline does to each image after decoding it.

TensorFlow's operations for the same, one after the other, take three times as long. `install.sh` compiles it; where
that was not done the pipeline uses TensorFlow's.
"""

import functools
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).with_name("_crop_resize.so")


@functools.cache
def crop_resize() -> Any:
    """Return the operation (images, boxes int32[k, 4], flips bool[k]) -> float32[k, size, size, 3], or None.

    `images` is a list of uint8[h, w, 3], or of uint8[n, h, w, 3] with n images each, k in all. Attributes are `size`,
    and `scale` and `shift`, three numbers each: a pixel becomes pixel * scale + shift.
    """
    if not LIBRARY.is_file():
        return None
    import tensorflow as tf

    return tf.load_op_library(str(LIBRARY)).hpctrain_crop_resize
