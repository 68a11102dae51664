"""Whether all ranks run the same program with the same configuration: asked once, before anything is built on it."""

import hashlib
import json
import platform
import sys
from typing import Any

from hpctrain import __version__
from hpctrain.config import Config
from hpctrain.errors import UserError
from hpctrain.parallel.world import World

_MAY_DIFFER = ("data.path", "data.staged")  # a node may have the same data in another place
_PACKAGES = ("tensorflow", "keras", "horovod", "numpy", "mpi4py")


def check_agreement(world: World, config: Config) -> None:
    """Raise UserError on every rank when a rank has another configuration or other packages than rank 0."""
    own = _facts(config)
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).digest()
    if len(set(world.allgather(digest))) == 1:
        return
    facts = world.allgather(own)
    rank = next(i for i, other in enumerate(facts) if other != facts[0])
    key = next(key for key in facts[0] if facts[rank].get(key) != facts[0][key])
    count = sum(other != facts[0] for other in facts)
    more = f" ({count} of {world.size} ranks differ)" if count > 1 else ""
    raise UserError(
        f"rank {rank} on {world.places[rank].host} has {key} {facts[rank].get(key)} where rank 0 on "
        f"{world.places[0].host} has {facts[0][key]}{more}; start all ranks with the same command and installation"
    )


def _facts(config: Config) -> dict[str, Any]:
    facts: dict[str, Any] = {"hpctrain": __version__, "python": platform.python_version()}
    for package in _PACKAGES:  # those that are loaded; no files are looked for
        facts[package] = getattr(sys.modules.get(package), "__version__", None)
    for section, values in config.model_dump(mode="json").items():
        if isinstance(values, dict):
            facts |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            facts[section] = values
    return {key: value for key, value in facts.items() if key not in _MAY_DIFFER}
