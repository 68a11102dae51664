"""The checksum of records is zlib's, whichever library computes it."""

import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data.checksum import crc32


@given(st.binary(max_size=5000), st.integers(0, 2**32 - 1))
def test_it_is_what_zlib_computes(content: bytes, start: int) -> None:
    assert crc32(content, start) == zlib.crc32(content, start)
    assert crc32(np.frombuffer(content, np.uint8)) == zlib.crc32(content)
