"""Images as files: the header of a JPEG, and re-encoding what cannot be kept as it came."""

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from hpctrain.data.shard import MAX_PIXELS
from hpctrain.errors import UserError

# Only these are opened: Pillow would start Ghostscript for some of the others. JPEG brings MPO along.
_PLUGINS = (JpegImagePlugin, PngImagePlugin, BmpImagePlugin, WebPImagePlugin, GifImagePlugin)
_LONGEST_JPEG_SIDE = 65500  # that libjpeg writes
_FORMATS = tuple(name for name in ("JPEG", "PNG", "BMP", "WEBP", "GIF") if name in Image.OPEN)
_DECODABLE_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended sequential, progressive; all Huffman-coded
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_DEFAULT_QUALITY = 95  # of images re-encoded for their format alone


class ImageError(UserError):
    """Bytes that are not an image which can be decoded."""


@dataclass(frozen=True)
class JpegHeader:
    """Size of the stored image in pixels (no rotation applied), number of color components, and coding."""

    height: int
    width: int
    components: int
    bits: int
    frame: int  # the marker: 0xC0 baseline, 0xC1 extended, 0xC2 progressive, others rare
    place: int  # byte at which the frame header starts

    @property
    def is_ordinary(self) -> bool:
        """True for what every decoder reads as gray or RGB: 8 bits, 1 or 3 components, Huffman-coded DCT."""
        return self.bits == 8 and self.components in (1, 3) and self.frame in _DECODABLE_FRAMES


def jpeg_header(blob: bytes) -> JpegHeader:
    """Read the frame header of a JPEG (ITU-T T.81, annex B); an ImageError says why there is none."""
    if blob[:3] != b"\xff\xd8\xff":
        raise ImageError("it does not start like a JPEG")
    place = 2
    while place + 4 <= len(blob):
        if blob[place] != 0xFF:
            raise ImageError(f"its JPEG header is damaged at byte {place}")
        marker = blob[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a length
            place += 2
            continue
        if marker in (0xD9, 0xDA):
            break
        if marker in _FRAMES:
            if place + 10 > len(blob):
                break
            bits, height, width, components = struct.unpack_from(">BHHB", blob, place + 4)
            if height == 0 or width == 0:
                raise ImageError("its JPEG header gives no size")
            return JpegHeader(height, width, components, bits, marker, place)
        place += 2 + max(2, int.from_bytes(blob[place + 2 : place + 4], "big"))
    raise ImageError("its JPEG header is cut off")


@dataclass(frozen=True)
class PreparedImage:
    """A record: its bytes, its size in pixels, and what was changed ("" for bytes kept as they came)."""

    blob: bytes
    height: int
    width: int
    conversion: str


def prepare_jpeg(blob: bytes, resize: int | None = None, quality: int = 90, decode: bool = False) -> PreparedImage:
    """Turn the bytes of an image file into a JPEG that TensorFlow decodes, keeping them where possible.

    With `resize`, images whose shorter side is longer than that many pixels are scaled down to it and encoded at
    `quality`; smaller ones are kept. Images that are not an ordinary JPEG are encoded as RGB JPEG at quality 95, or at
    `quality` where they are scaled. Damaged files raise an ImageError: those that cannot be decoded; of a JPEG that is
    kept only header and end are looked at, unless `decode` asks for more. Rotation tags are ignored, as TensorFlow
    ignores them; transparency is dropped.
    """
    if not decode and (kept := _kept_as_it_is(blob, resize)) is not None:
        return kept
    with _open(blob) as image:
        width, height = image.size
        scale = resize is not None and min(width, height) > resize
        if not scale:
            _check_pixels(width, height)
        conversion = _why_not_kept(blob, image)
        if not scale and not conversion:
            _load_coarsely(image)
            return PreparedImage(blob, height, width, "")
        if scale:
            assert resize is not None
            size = _scaled_size(width, height, resize)
            rgb = _scaled(image, size)
            return PreparedImage(_encode(rgb, quality), size[1], size[0], conversion or "resized")
        return PreparedImage(_encode(_to_rgb(image), _DEFAULT_QUALITY), height, width, conversion)


def _kept_as_it_is(blob: bytes, resize: int | None) -> PreparedImage | None:
    """Return an ordinary JPEG that needs no scaling and has an end, not decoded; None if it takes a closer look.

    A file that was cut off has no end marker behind its frame header (the one of an embedded preview lies before), and
    decoders take what is wrong between the two, if anything, for a warning.
    """
    try:
        header = jpeg_header(blob)
    except ImageError:
        return None  # another format, or damaged
    small = resize is None or min(header.width, header.height) <= resize
    if small:
        _check_pixels(header.width, header.height)
    if small and header.is_ordinary and blob.rfind(b"\xff\xd9") > header.place:
        return PreparedImage(blob, header.height, header.width, "")
    return None


def prepare_raw(blob: bytes, size: int) -> PreparedImage:
    """Decode an image to uint8[size, size, 3]: shorter side scaled up or down to `size`, center cut out."""
    with _open(blob) as image:
        width, height = _scaled_size(*image.size, size)
        if width * height > MAX_PIXELS:
            raise ImageError(f"its shape of {image.width} x {image.height} pixels is too long to scale")
        rgb = _scaled(image, (width, height))
    left, top = (width - size) // 2, (height - size) // 2
    pixels = rgb.crop((left, top, left + size, top + size)).tobytes()
    return PreparedImage(pixels, size, size, "decoded")


def encode_jpeg(pixels: NDArray[np.uint8], quality: int = 95) -> bytes:
    """Encode uint8[height, width, 3] as a JPEG."""
    return _encode(Image.fromarray(pixels), quality)


def check_decodes(blob: bytes) -> None:
    """Decode all of a JPEG; raises an ImageError where that fails."""
    with _open(blob) as image:
        _load_coarsely(image)


def _open(blob: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and odd metadata
            return Image.open(io.BytesIO(blob), formats=_FORMATS)
    except Image.UnidentifiedImageError:
        raise ImageError("it is not an image in a known format") from None
    except MemoryError:  # the node's fault and not the image's
        raise
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise ImageError(f"it cannot be decoded ({error})") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"its {width} x {height} pixels are more than the {MAX_PIXELS:,} that an image may have")


def _load_coarsely(image: Image.Image) -> None:
    """Decode all the bytes of a JPEG but compute only an eighth of the pixels a side: a quick check."""
    image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
    _load(image)


def _load(image: Image.Image) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(f"it cannot be decoded ({error})") from error


def _why_not_kept(blob: bytes, image: Image.Image) -> str:
    if image.format not in ("JPEG", "MPO"):
        return str(image.format)
    header = jpeg_header(blob)
    if header.is_ordinary and (header.width, header.height) == image.size:
        return ""
    return "CMYK JPEG" if header.components == 4 else "unusual JPEG"


def _to_rgb(image: Image.Image) -> Image.Image:
    _load(image)
    if image.mode.startswith("I"):  # 16 bits of gray, which Pillow's own conversion would clip
        return Image.fromarray((np.asarray(image, np.int32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _scaled_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Width and height with the shorter side at `shorter` pixels and the proportions kept, rounded to nearest."""
    if width <= height:
        return shorter, max(shorter, (height * shorter * 2 + width) // (2 * width))
    return max(shorter, (width * shorter * 2 + height) // (2 * height)), shorter


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    image.draft(None, (2 * size[0], 2 * size[1]))  # a JPEG much larger than needed is decoded at a smaller size
    return _to_rgb(image).resize(size, Image.Resampling.BICUBIC)  # which filters against aliasing


def _encode(image: Image.Image, quality: int) -> bytes:
    if max(image.size) > _LONGEST_JPEG_SIDE:
        raise ImageError(
            f"its {image.width} x {image.height} pixels do not fit into a JPEG: {_LONGEST_JPEG_SIDE:,} a side"
        )
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
