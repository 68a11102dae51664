"""Site profiles: what is known of a machine, one YAML file each."""

from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hpctrain.errors import UserError, nearest
from hpctrain.yaml_file import explain, read_yaml


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Network(_Part):
    """The alpha-beta model of a network: a message of n bytes between two nodes takes latency + n * seconds a byte."""

    latency_seconds: float = Field(gt=0, description="alpha: time of an empty message")
    seconds_per_byte: float = Field(gt=0, description="beta: the inverse of a node's bandwidth")
    source: str = Field(description="where the two numbers come from")


class Site(_Part):
    """One machine."""

    name: str = Field(description="the profile's name")
    description: str = Field(description="the machine in words")
    source: str = Field(description="where the profile's facts come from")
    nodes: int = Field(gt=0, description="how many nodes it has")
    network: Network
    images_per_second: dict[str, float] = Field(
        default_factory=dict, description="training rate of one node by model, as published"
    )


def own_folder() -> Path:
    """Return the folder of a user's own profiles."""
    return Path.home() / ".config" / "hpctrain" / "sites"


def site_names() -> list[str]:
    """Return the names of all profiles, the package's and the user's own, sorted."""
    folders = (resources.files("hpctrain.jobs") / "sites", own_folder())
    return sorted({e.name.removesuffix(".yaml") for f in folders if f.is_dir() for e in f.iterdir() if _is_yaml(e)})


def _is_yaml(entry: object) -> bool:
    return str(getattr(entry, "name", "")).endswith(".yaml")


def find_site(site: str) -> Path:
    """Return the YAML file of a profile's name or path; a user's own goes before the package's. Raises UserError."""
    if site.endswith((".yaml", ".yml")) or "/" in site:
        if not Path(site).is_file():
            raise UserError(f"there is no file {site}; give a YAML file or one of the names in `hpctrain sites`")
        return Path(site)
    for folder in (own_folder(), Path(str(resources.files("hpctrain.jobs") / "sites"))):
        if (folder / f"{site}.yaml").is_file():
            return folder / f"{site}.yaml"
    raise UserError(f"there is no site named {site!r}; {nearest(site, site_names())}")


def load_site(site: str) -> Site:
    """Return the profile of a name or YAML file, or raise UserError in one sentence."""
    path = find_site(site)
    try:
        return Site.model_validate(read_yaml(path))
    except ValidationError as error:
        known = [*Site.model_fields, *(f"network.{key}" for key in Network.model_fields)]
        raise UserError(explain(error, str(path), known)) from None
