"""Turns what ImageNet comes as into shards. `prepare` is the one entry; a new kind of input is a class in `sources`."""

from hpctrain._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Alone": "hpctrain.data.prepare.group",
        "Group": "hpctrain.data.prepare.group",
        "ImageSource": "hpctrain.data.prepare.sources",
        "SourceImage": "hpctrain.data.prepare.sources",
        "prepare": "hpctrain.data.prepare.run",
    },
)
