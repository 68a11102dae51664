"""The compiled operation for images: right at every edge, on damaged arguments too."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data.reader import pack
from hpctrain.native import crop_resize
from tests.conftest import image_bytes

tf = pytest.importorskip("tensorflow")

SCALE, SHIFT = [0.5, 2.0, -1.0], [1.0, 0.0, 10.0]


def operations() -> Any:
    found = crop_resize()
    assert found is not None, "run `python -m hpctrain.native.build`"
    return found


def run(image: np.ndarray, box: list[int], flip: bool, size: int) -> np.ndarray:
    batch = operations().hpctrain_crop_resize([image], [box], [flip], size=size, scale=SCALE, shift=SHIFT)
    return np.asarray(batch)[0]


def run_files(files: list[bytes], boxes: list[list[int]], flips: list[bool], size: int) -> np.ndarray:
    decode = operations().hpctrain_decode_crop_resize
    return np.asarray(decode(*pack(files), boxes, flips, size=size, scale=SCALE, shift=SHIFT))


def expected(image: np.ndarray, box: list[int], flip: bool, size: int) -> np.ndarray:
    """Bilinear interpolation in float64, pixel centers at half-integers."""
    top, left, height, width = box
    pixels = image[top : top + height, left : left + width].astype(np.float64)
    for axis, length in ((0, height), (1, width)):
        at = (np.arange(size) + 0.5) * length / size - 0.5
        low = np.floor(at).astype(int)
        share = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        lower = np.take(pixels, np.maximum(low, 0), axis)
        pixels = lower + (np.take(pixels, np.minimum(low + 1, length - 1), axis) - lower) * share
    pixels = pixels[:, ::-1] if flip else pixels
    return pixels * SCALE + SHIFT


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_cuts_resizes_mirrors_and_normalizes(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    box_height, box_width = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    box = [
        data.draw(st.integers(0, height - box_height)),
        data.draw(st.integers(0, width - box_width)),
        box_height,
        box_width,
    ]
    flip, size = data.draw(st.booleans()), data.draw(st.integers(1, 50))
    image = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, (height, width, 3)).astype(np.uint8)
    found = run(image, box, flip, size)
    assert found.dtype == np.float32 and found.shape == (size, size, 3)
    np.testing.assert_allclose(found, expected(image, box, flip, size), atol=2e-2 if size > 40 else 1e-2, rtol=0)


@pytest.mark.parametrize(
    "box", [[-1, 0, 2, 2], [0, -1, 2, 2], [0, 0, 0, 2], [0, 0, 2, 0], [3, 0, 3, 2], [0, 4, 2, 3], [2**31 - 1, 0, 1, 1]]
)
def test_a_box_outside_the_image_is_an_error(box: list[int]) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="box"):
        run(np.zeros((5, 6, 3), np.uint8), box, False, 4)


@pytest.mark.parametrize("shape", [(5, 6, 1), (5, 6), (5, 6, 4)])
def test_other_shapes_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected images"):
        run(np.zeros(shape, np.uint8), [0, 0, 1, 1], False, 4)


# Sizes whose rows end amid four pixels, and images smaller and larger than the one before, so that memory is reused.
@pytest.mark.parametrize("size", [1, 3, 4, 5, 6, 21, 64])
def test_files_are_decoded_as_by_tensorflow_and_then_treated_like_decoded_images(size: int) -> None:
    files = [image_bytes(i, 60 - 13 * (i % 4), 30 + 17 * (i % 3)) for i in range(5)]
    boxes, flips = (
        [[0, 0, 20, 30], [3, 1, 17, 29], [0, 5, 1, 1], [2, 2, 8, 21], [7, 0, 50, 25]],
        [i % 2 == 0 for i in range(5)],
    )
    batch = run_files(files, boxes, flips, size)
    for file, box, flip, found in zip(files, boxes, flips, batch, strict=True):
        options: dict[str, Any] = {"channels": 3, "dct_method": "INTEGER_FAST", "fancy_upscaling": False}
        pixels = tf.image.decode_and_crop_jpeg(file, box, **options).numpy()
        np.testing.assert_array_equal(found, run(pixels, [0, 0, *box[2:]], flip, size))


@pytest.mark.parametrize(
    ("change", "box"),
    [
        (lambda file: b"", [0, 0, 4, 4]),
        (lambda file: b"no image", [0, 0, 4, 4]),
        (lambda file: file[: len(file) // 2], [0, 0, 20, 20]),
        (lambda file: file, [10, 0, 20, 4]),
        (lambda file: file, [0, -1, 4, 4]),
        (lambda file: file, [0, 0, 0, 4]),
        (lambda file: file, [2**31 - 1, 0, 2**31 - 1, 4]),
    ],
)
def test_a_file_that_cannot_be_decoded_is_an_error(change: Callable[[bytes], bytes], box: list[int]) -> None:
    good = image_bytes(0, 20, 20)
    with pytest.raises(tf.errors.InvalidArgumentError, match="image 1 of the batch"):
        run_files([good, change(good)], [[0, 0, 4, 4], box], [False, False], 8)


def test_too_few_boxes_are_an_error() -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="a box"):
        run_files([image_bytes(0, 20, 20)] * 2, [[0, 0, 4, 4]], [False], 8)


def test_files_may_lie_amid_other_bytes() -> None:
    files = [image_bytes(i, 20, 20) for i in range(4)]
    packed, offsets = pack(files)
    boxes, attributes = [[0, 0, 9, 9], [1, 2, 19, 18]], {"size": 8, "scale": SCALE, "shift": SHIFT}
    found = operations().hpctrain_decode_crop_resize(packed, offsets[1:4], boxes, [False, True], **attributes)
    np.testing.assert_array_equal(found, run_files(files[1:3], boxes, [False, True], 8))


@pytest.mark.parametrize("offsets", [[], [-1, 9], [0, 10], [0, 5, 3, 9], [0, -1, 9], [0, 2**62, 9], [10], [10, 10]])
def test_offsets_that_do_not_cut_the_bytes_into_files_are_an_error(offsets: list[int]) -> None:
    boxes, flips = np.zeros((len(offsets) - 1 if offsets else 0, 4), np.int32), [False] * (len(offsets) - 1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="offsets"):
        operations().hpctrain_decode_crop_resize(
            np.zeros(9, np.uint8), np.array(offsets, np.int64), boxes, flips, size=8, scale=SCALE, shift=SHIFT
        )
