"""Where images come from. A kind of input is one class: it lists its images once, and reads one in any process."""

from hpctrain.data.prepare.sources.base import IMAGE_SUFFIXES, ImageList, ImageSource, Listing, SourceImage
from hpctrain.data.prepare.sources.choose import open_source
from hpctrain.data.prepare.sources.folders import ClassFolders

__all__ = ["IMAGE_SUFFIXES", "ClassFolders", "ImageList", "ImageSource", "Listing", "SourceImage", "open_source"]
