"""Crops and flips: inside the image for every size, with the promised distribution, and a function of the record."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpctrain.data.augment import ASPECT, Boxes, central_boxes, training_boxes

SIDES = st.one_of(st.integers(1, 12), st.integers(1, 700), st.just(20_000))
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=30)


def sizes_of(pairs: list[tuple[int, int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    heights, widths = np.array(pairs, np.int32).T
    return heights, widths


def draw_boxes(
    kind: str, height: int, width: int, count: int = 5000, epoch: int = 0, seed: int = 1, **options: float
) -> tuple[Boxes, NDArray[np.bool_]]:
    """Boxes and flips of many records of one size."""
    return training_boxes(
        kind,
        np.full(count, height, np.int32),
        np.full(count, width, np.int32),
        np.arange(count),
        np.full(count, epoch),
        seed,
        **options,  # type: ignore[arg-type]
    )


def assert_inside(boxes: Boxes, heights: NDArray[np.int32], widths: NDArray[np.int32]) -> None:
    tops, lefts, box_heights, box_widths = boxes.T
    assert boxes.dtype == np.int32
    assert (box_heights >= 1).all() and (box_widths >= 1).all()
    assert (tops >= 0).all() and (tops + box_heights <= heights).all()
    assert (lefts >= 0).all() and (lefts + box_widths <= widths).all()


@given(SIZES, st.sampled_from(["none", "weak", "heavy"]), st.floats(1e-3, 1), st.integers(0, 2**31 - 1))
def test_boxes_are_inside_the_image(pairs: list[tuple[int, int]], kind: str, crop_fraction: float, seed: int) -> None:
    heights, widths = sizes_of(pairs)
    records = np.arange(len(pairs))
    boxes, flips = training_boxes(
        kind, heights, widths, records, np.zeros_like(records), seed, crop_fraction=crop_fraction
    )
    assert flips.dtype == np.bool_ and flips.shape == (len(pairs),)
    assert_inside(boxes, heights, widths)
    assert_inside(central_boxes(heights, widths, crop_fraction), heights, widths)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (224, 224), (400, 300), (64, 48)])
def test_heavy_covers_the_promised_areas_and_aspect_ratios(height: int, width: int) -> None:
    boxes, _ = draw_boxes("heavy", height, width)
    box_heights, box_widths = boxes[:, 2].astype(float), boxes[:, 3].astype(float)
    shares = box_heights * box_widths / (height * width)
    aspects = box_widths / box_heights
    rounding = 1 + 1.1 / np.minimum(box_heights, box_widths)  # half a pixel at each side
    assert (shares * rounding >= 0.08).all() and shares.max() <= 1
    assert (aspects * rounding >= ASPECT[0]).all() and (aspects / rounding <= ASPECT[1]).all()
    # Not always the same box: small and large, wide and tall, at all places.
    assert shares.min() < 0.1 and shares.max() > 0.9
    assert aspects.min() < 0.8 and aspects.max() > 1.25
    small = shares < 0.2
    middle = (boxes[small, 0] + box_heights[small] / 2) / height, (boxes[small, 1] + box_widths[small] / 2) / width
    for centers in middle:
        assert centers.min() < 0.3 and centers.max() > 0.7 and abs(centers.mean() - 0.5) < 0.05


def test_heavy_draws_area_uniformly_and_aspect_ratio_log_uniformly() -> None:
    """As long as every box fits, which is so for a square image and areas below 3/4."""
    boxes, _ = draw_boxes("heavy", 1000, 1000, 20_000)
    shares = boxes[:, 2] * (boxes[:, 3] / 1e6)
    fitting = shares < 0.74
    quarters = np.histogram(shares[fitting], np.linspace(0.08, 0.74, 5))[0]
    assert abs(quarters / quarters.mean() - 1).max() < 0.05
    log_aspects = np.log(boxes[fitting, 3] / boxes[fitting, 2])
    assert abs(log_aspects.mean()) < 0.01
    assert abs(log_aspects.std() - np.log(16 / 9) / 12**0.5) < 0.01


@pytest.mark.parametrize(("height", "width"), [(10, 4000), (4000, 10), (1, 300)])
def test_heavy_on_a_strip_keeps_to_the_aspect_ratio_as_far_as_it_can(height: int, width: int) -> None:
    """No box of 8 % of the area fits; the largest with an allowed aspect ratio is taken instead."""
    boxes, _ = draw_boxes("heavy", height, width, 200)
    shorter, longer = min(height, width), boxes[:, 2:].max(axis=1)
    assert (boxes[:, 2:].min(axis=1) == shorter).all()
    assert (abs(longer - shorter * 4 / 3) <= 0.5).all()


def test_weak_has_the_exact_size_and_every_place() -> None:
    boxes, _ = draw_boxes("weak", 256, 320)
    assert (boxes[:, 2] == 224).all() and (boxes[:, 3] == 280).all()
    assert np.array_equal(np.unique(boxes[:, 0]), np.arange(33))
    assert np.array_equal(np.unique(boxes[:, 1]), np.arange(41))
    counts = np.bincount(boxes[:, 0])
    assert abs(counts - 5000 / 33).max() < 6 * np.sqrt(5000 / 33)


def test_weak_with_the_whole_image() -> None:
    boxes, _ = draw_boxes("weak", 31, 17, crop_fraction=1.0)
    assert (boxes == [0, 0, 31, 17]).all()


@pytest.mark.parametrize("kind", ["weak", "heavy"])
def test_half_of_the_images_are_mirrored_or_none(kind: str) -> None:
    _, flips = draw_boxes(kind, 100, 100)
    assert abs(flips.mean() - 0.5) < 0.03
    boxes, flips = draw_boxes(kind, 100, 100, flip=False)
    assert not flips.any()
    assert np.array_equal(boxes, draw_boxes(kind, 100, 100)[0])  # the crops do not follow the flips


def test_flip_place_and_size_are_independent() -> None:
    boxes, flips = draw_boxes("heavy", 300, 300, 20_000)
    columns = np.stack([boxes[:, 2] / boxes[:, 3], boxes[:, 2] * boxes[:, 3].astype(float), flips])
    # Where in its range of possible places a box lies
    columns = np.vstack([columns, boxes[:, 0] / (301 - boxes[:, 2]), boxes[:, 1] / (301 - boxes[:, 3])])
    correlations = np.corrcoef(columns) - np.eye(5)
    assert abs(correlations).max() < 0.06


def test_none_is_the_central_square_and_what_evaluation_takes() -> None:
    heights, widths = np.array([256, 375, 100, 1]), np.array([256, 500, 33, 7])
    boxes, flips = training_boxes("none", heights, widths, np.arange(4), np.zeros(4, np.int64), 0)
    assert not flips.any()
    assert np.array_equal(boxes, central_boxes(heights, widths))
    assert boxes.tolist()[:2] == [[16, 16, 224, 224], [23, 86, 328, 328]]
    assert boxes[2].tolist() == [35, 2, 29, 29]
    assert boxes[3].tolist() == [0, 3, 1, 1]


@given(SIZES, st.sampled_from(["weak", "heavy"]), st.randoms(use_true_random=False))
def test_a_record_is_cut_alike_in_whatever_company(pairs: list[tuple[int, int]], kind: str, random) -> None:  # type: ignore[no-untyped-def]
    """The same alone, in another order, and on another rank: a function of (seed, epoch, record) and its size."""
    heights, widths = sizes_of(pairs)
    records, epochs = np.arange(len(pairs)) * 37, np.arange(len(pairs)) % 3
    boxes, flips = training_boxes(kind, heights, widths, records, epochs, 11)
    some = np.array(random.sample(range(len(pairs)), k=random.randint(1, len(pairs))))
    boxes_of_some, flips_of_some = training_boxes(kind, heights[some], widths[some], records[some], epochs[some], 11)
    assert np.array_equal(boxes_of_some, boxes[some]) and np.array_equal(flips_of_some, flips[some])


@pytest.mark.parametrize("kind", ["weak", "heavy"])
def test_another_seed_or_epoch_or_record_is_cut_otherwise(kind: str) -> None:
    base, base_flips = draw_boxes(kind, 400, 500)
    for seed, epoch in ((1, 1), (2, 0)):
        boxes, flips = draw_boxes(kind, 400, 500, epoch=epoch, seed=seed)
        assert (boxes != base).any(axis=1).mean() > 0.95
        assert abs((flips != base_flips).mean() - 0.5) < 0.05
    assert (base[1:] != base[:-1]).any(axis=1).mean() > 0.95


@pytest.mark.parametrize(
    ("kind", "expected_boxes", "expected_flips"),
    [
        ("weak", [[47, 45, 328, 438], [11, 6, 291, 438], [4, 10, 438, 328]], [False, False, True]),
        ("heavy", [[127, 158, 248, 283], [44, 29, 162, 215], [21, 38, 173, 202]], [False, False, True]),
    ],
)
def test_the_crops_are_pinned(kind: str, expected_boxes: list[list[int]], expected_flips: list[bool]) -> None:
    """Runs are to be repeated for years: a change here changes all of them."""
    heights, widths = np.array([375, 333, 500]), np.array([500, 500, 375])
    boxes, flips = training_boxes(kind, heights, widths, np.array([3, 900, 12]), np.array([0, 7, 1]), 5)
    assert boxes.tolist() == expected_boxes and flips.tolist() == expected_flips


def test_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="strong"):
        draw_boxes("strong", 10, 10)
