"""Images as large as ImageNet's, made from two photographs that come with scikit-learn."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image


def photographs() -> list[np.ndarray]:
    """Return scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images)


def jpegs(count: int) -> Iterator[bytes]:
    """Make ImageNet-like JPEGs: parts of photographs at 500x375 pixels with a little noise, quality 92."""
    random = np.random.default_rng(0)
    sources = photographs()
    for _ in range(count):
        source = sources[random.integers(len(sources))]
        height = int(random.integers(240, 400))
        width = height * 4 // 3
        top, left = random.integers(source.shape[0] - height), random.integers(source.shape[1] - width)
        part = Image.fromarray(source[top : top + height, left : left + width])
        part = part.resize((500, 375), Image.Resampling.BICUBIC)
        pixels = np.asarray(part, np.float32) + random.normal(0, 4, (375, 500, 1))
        file = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
        yield file.getvalue()
