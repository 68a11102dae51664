"""CRC-32 of records, the same as zlib's.

Every record that is read is checked, and zlib's routine takes longer for that than reading from memory does. ISA-L uses
the processor's carry-less multiplication; there are wheels of it for x86-64 and ARM.
"""

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
