"""The compiled operation for images: right at every edge, on damaged arguments too."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.native import crop_resize

tf = pytest.importorskip("tensorflow")

SCALE, SHIFT = [0.5, 2.0, -1.0], [1.0, 0.0, 10.0]


def run(image: np.ndarray, box: list[int], flip: bool, size: int) -> np.ndarray:
    operation = crop_resize()
    assert operation is not None, "run `python -m hpctrain.native.build`"
    return np.asarray(operation([image], [box], [flip], size=size, scale=SCALE, shift=SHIFT))[0]


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
