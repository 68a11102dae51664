"""CRC-32C (Castagnoli), the checksum of TFRecords, at some 200 MB/s in NumPy.

A checksum is a sequence of steps, one a byte, but a linear one: the data are cut into 2,048 lanes whose steps NumPy
takes side by side, and the lanes' results are moved on by the bytes that follow them and added (exclusive or), pair by
pair. Leading zeros do not change a state of zero, so the lanes need not be full.
"""

import functools
import itertools

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # 0x1EDC6F41 with its bits reversed
_LANES = 2048
_SHORT_BYTES = 512
_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)
_MASK_DELTA = 0xA282EAD8


def _byte_table() -> NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


_BYTE = _byte_table()
_BYTE_LIST: list[int] = _BYTE.tolist()


@functools.cache
def _word_table() -> NDArray[np.uint32]:
    """What two bytes of zero make of a state of 16 bits."""
    states = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(2):
        states = (states >> 8) ^ _BYTE[states & 255]
    return states


@functools.lru_cache(maxsize=256)
def _operator(power: int) -> NDArray[np.uint32]:
    """Tables uint32[4, 256] by which 2**power bytes of zero change a state, for each byte of the state."""
    columns = (_BITS >> 8) ^ _BYTE[_BITS & 255]
    if power:
        half = _operator(power - 1)
        columns = _apply(half, _apply(half, _BITS))
    tables = np.zeros((4, 256), np.uint32)
    for bit in range(32):
        tables[bit // 8] ^= np.where(np.arange(256) >> (bit % 8) & 1, columns[bit], np.uint32(0))
    return tables


def _apply(tables: NDArray[np.uint32], states: NDArray[np.uint32]) -> NDArray[np.uint32]:
    result: NDArray[np.uint32] = tables[0][states & 255] ^ tables[1][states >> 8 & 255]
    return result ^ tables[2][states >> 16 & 255] ^ tables[3][states >> 24]


def _after_zeros(states: NDArray[np.uint32], num_bytes: int) -> NDArray[np.uint32]:
    for power in range(num_bytes.bit_length()):
        if num_bytes >> power & 1:
            states = _apply(_operator(power), states)
    return states


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of some bytes (RFC 3720, appendix B.4)."""
    if len(data) < _SHORT_BYTES:
        state = 0xFFFFFFFF
        for byte in data:
            state = (state >> 8) ^ _BYTE_LIST[(state ^ byte) & 255]
        return state ^ 0xFFFFFFFF
    # 4, 6, 8, 12, 16, ...: two of the operators at most move a lane on.
    sizes = (size for power in itertools.count(2) for size in (1 << power, 3 << power - 1))
    lane_bytes = next(size for size in sizes if size * _LANES >= len(data))
    padded = np.zeros(_LANES * lane_bytes, np.uint8)
    start = len(padded) - len(data)
    padded[start:] = np.frombuffer(data, np.uint8)
    padded[start : start + 4] ^= 255  # the same as a first state of all ones
    words = padded.view("<u2").reshape(_LANES, -1).T.copy()
    table = _word_table()
    states = np.zeros(_LANES, np.uint32)
    for row in words:
        states = (states >> 16) ^ table[(states ^ row) & 0xFFFF]
    while len(states) > 1:
        states = _after_zeros(states[0::2], lane_bytes) ^ states[1::2]
        lane_bytes *= 2
    return int(states[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """Return the checksum as TFRecords store it: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF
