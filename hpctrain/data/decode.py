"""From the bytes of a batch of images to normalized pixels, in TensorFlow."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hpctrain.data.reader import parts
from hpctrain.native import crop_resize

MEAN_RGB = (123.675, 116.28, 103.53)  # of ImageNet, in 0..255, as most published ResNet results use
STDDEV_RGB = (58.395, 57.12, 57.375)
PADDING_SIZE, PADDING_GRAY = 8, 128  # side in pixels, and color, of the image that stands for one that is not there


def make_decoder(encoding: str, micro_batch: int, image_size: int) -> Callable[[Any, Any, Any], Any]:
    """Return (images, boxes int32[k, 4], flips bool[k]) -> float32[k, S, S, 3]: cut out, resized, mirrored, normalized.

    k is `micro_batch`. `images` are k JPEG files that follow each other in (bytes uint8[n], offsets int64[k + 1]), of
    which only the box is decoded ("jpeg"), or uint8[k, height, width, 3] ("raw"). Resizing is bilinear, with pixel
    centers at half-integers. JPEGs are decoded with the fast integer transform and without smoothing colors, as
    benchmarks of TensorFlow have always done.
    """
    scale = 1 / np.array(STDDEV_RGB)
    shift = -np.array(MEAN_RGB) * scale
    if operations := crop_resize():
        attributes = {"size": image_size, "scale": scale.tolist(), "shift": shift.tolist()}

        def by_operation(images: Any, boxes: Any, flips: Any) -> Any:
            boxes = tf.ensure_shape(boxes, [micro_batch, 4])
            if encoding == "raw":
                return operations.hpctrain_crop_resize([images], boxes, flips, **attributes)
            return operations.hpctrain_decode_crop_resize(*images, boxes, flips, **attributes)

        return by_operation

    finish = _finisher(micro_batch, image_size, scale, shift)

    def decode(images: Any, boxes: Any, flips: Any) -> Any:
        boxes = tf.ensure_shape(boxes, [micro_batch, 4])
        if encoding == "raw":
            return finish(tf.unstack(images, micro_batch), boxes, flips)
        pixels = [
            tf.image.decode_and_crop_jpeg(blob, box, channels=3, dct_method="INTEGER_FAST", fancy_upscaling=False)
            for blob, box in zip(tf.unstack(_strings(*images), micro_batch), tf.unstack(boxes), strict=True)
        ]
        return finish(pixels, boxes * tf.constant([0, 0, 1, 1]), flips)  # all of what was decoded

    return decode


def _strings(packed: Any, offsets: Any) -> Any:
    """Return the JPEG files as string[k]: TensorFlow's decoder takes no others."""

    def cut(packed: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.object_]:
        strings = np.empty(len(offsets) - 1, object)
        strings[:] = [bytes(part) for part in parts(packed, offsets)]
        return strings

    return tf.numpy_function(cut, [packed, offsets], tf.string)


def _finisher(
    micro_batch: int, image_size: int, scale: NDArray[np.float64], shift: NDArray[np.float64]
) -> Callable[[list[Any], Any, Any], Any]:
    """Return (list of uint8[h, w, 3], boxes, flips) -> float32[k, S, S, 3], by TensorFlow's operations."""
    # As large as an image: multiplying and adding three numbers along the last axis takes four times as long.
    image_shape = (image_size, image_size, 3)
    scales = tf.constant(np.broadcast_to(scale, image_shape), tf.float32)
    shifts = tf.constant(np.broadcast_to(shift, image_shape), tf.float32)

    def one(pixels: Any, box: Any, flip: Any) -> Any:
        part = tf.slice(pixels, [box[0], box[1], 0], [box[2], box[3], 3])[tf.newaxis]
        image = tf.raw_ops.ResizeBilinear(images=part, size=[image_size, image_size], half_pixel_centers=True)[0]
        return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image) * scales + shifts

    def finish(images: list[Any], boxes: Any, flips: Any) -> Any:
        parts = zip(images, tf.unstack(boxes, micro_batch), tf.unstack(flips, micro_batch), strict=True)
        return tf.stack([one(*part) for part in parts])

    return finish


@functools.cache
def padding_jpeg() -> bytes:
    """Return a small gray JPEG."""
    gray = tf.fill([PADDING_SIZE, PADDING_SIZE, 3], tf.constant(PADDING_GRAY, tf.uint8))
    return bytes(tf.io.encode_jpeg(gray).numpy())
