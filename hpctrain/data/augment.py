"""Augmentation as arithmetic: which box of an image is cut out, and whether it is mirrored.

Every kind of augmentation here, and the crop of the evaluation too, is a box in the coordinates of the stored image
that is resized to the network's input. So one decode-crop-resize path in TensorFlow serves all of them, and what is
random is a pure NumPy function of (seed, epoch, record), computed for many records at once.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.hashing import uniform

AREA = (0.08, 1.0)  # of the image, Szegedy et al., "Going deeper with convolutions", section 6
ASPECT = (3 / 4, 4 / 3)
_SIZE_DRAWS = 3  # the number of the first random number for the size of a box; those before: flip, top, left
_ATTEMPTS = 10  # boxes that are tried before the largest central one is taken, as common implementations do

Boxes = NDArray[np.int32]  # [n, 4]: top, left, height, width in pixels


def training_boxes(
    kind: str,
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
    records: NDArray[np.int64],
    epochs: NDArray[np.int64],
    seed: int,
    *,
    crop_fraction: float = 0.875,
    flip: bool = True,
) -> tuple[Boxes, NDArray[np.bool_]]:
    """Return (boxes int32[n, 4], flips bool[n]) for n records of the given sizes.

    `kind` is `heavy` (random area and aspect ratio, Szegedy et al. 2014), `weak` (a random box of `crop_fraction` of
    each side, which is "resize to 256, crop 224 at random" done in one go, Krizhevsky et al. 2012) or `none` (the
    central square, as in evaluation, never mirrored).
    """
    if kind == "none":
        return central_boxes(heights, widths, crop_fraction), np.zeros(len(records), np.bool_)
    # The n-th random number of each (seed, epoch, record), [n, record]. All at once: calls cost more than numbers do.
    numbers = np.arange(_SIZE_DRAWS + (2 * _ATTEMPTS if kind == "heavy" else 0))
    draws = uniform(seed, epochs, records, numbers[:, np.newaxis])
    flips = draws[0] < 0.5 if flip else np.zeros(len(records), np.bool_)
    if kind == "weak":
        box_heights = _at_least_one(heights * crop_fraction)
        box_widths = _at_least_one(widths * crop_fraction)
    elif kind == "heavy":
        box_heights, box_widths = _inception_sizes(heights, widths, draws[_SIZE_DRAWS:])
    else:
        raise ValueError(f"unknown augmentation {kind!r}")
    tops = (draws[1] * (heights - box_heights + 1)).astype(np.int64)
    lefts = (draws[2] * (widths - box_widths + 1)).astype(np.int64)
    return np.stack([tops, lefts, box_heights, box_widths], axis=1).astype(np.int32), flips


def central_boxes(heights: NDArray[np.integer], widths: NDArray[np.integer], crop_fraction: float = 0.875) -> Boxes:
    """Return the central squares of `crop_fraction` of the shorter side: "resize to 256, central crop of 224"."""
    side = _at_least_one(np.minimum(heights, widths) * crop_fraction)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1).astype(np.int32)


def _at_least_one(sides: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    return np.maximum(np.round(sides).astype(np.int64), 1)


def _inception_sizes(
    heights: NDArray[np.integer], widths: NDArray[np.integer], draws: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Box sizes of random area and log-uniform aspect ratio; the first of ten attempts that fits into the image.

    `draws` are two random numbers an attempt, [2 * attempts, record].
    """
    area = heights.astype(np.float64) * widths * (AREA[0] + (AREA[1] - AREA[0]) * draws[0::2])
    log_low, log_high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = np.exp(log_low + (log_high - log_low) * draws[1::2])
    try_heights, try_widths = _at_least_one(np.sqrt(area / aspect)), _at_least_one(np.sqrt(area * aspect))
    fits = (try_heights <= heights) & (try_widths <= widths)
    first = (fits.argmax(axis=0), np.arange(len(heights)))
    # Where none fits: the largest central box whose aspect ratio is allowed.
    largest_heights = np.minimum(heights, _at_least_one(widths / ASPECT[0]))
    largest_widths = np.minimum(widths, _at_least_one(heights * ASPECT[1]))
    return (
        np.where(fits[first], try_heights[first], largest_heights),
        np.where(fits[first], try_widths[first], largest_widths),
    )
