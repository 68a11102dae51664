"""Site profiles load, and mistakes in one are told in a sentence."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hpctrain.errors import UserError
from hpctrain.jobs.site import (
    FastMemory,
    Network,
    Node,
    Partition,
    Site,
    find_site,
    load_site,
    own_folder,
    partition_for,
    site_names,
)

GUIDE = Path(__file__).parents[2] / "docs" / "sites.md"


@pytest.mark.parametrize("name", site_names())
def test_a_profile_is_named_for_its_file_and_says_where_it_is_from(name: str) -> None:
    site = load_site(name)
    assert site.name == name and site.description and site.source and site.network.source


def test_a_users_own_profile_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = find_site("nurion-knl").read_text()
    own_folder().mkdir(parents=True)
    (own_folder() / "mine.yaml").write_text(text.replace("name: nurion-knl", "name: mine"))
    (own_folder() / "nurion-knl.yaml").write_text(text.replace("nodes: 8305", "nodes: 7"))
    assert "mine" in site_names() and load_site("mine").name == "mine"
    assert load_site("nurion-knl").nodes == 7
    assert load_site(str(own_folder() / "mine.yaml")).name == "mine"


def changed(tmp_path: Path, like: str, keys: dict[str, Any]) -> str:
    """The path of a profile like the named one but for some keys; None leaves a key out."""
    values = {**yaml.safe_load(find_site(like).read_text()), **keys}
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False))
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("nodes: 8305", "nodes: many", "nodes is 'many'"),
        ("nodes: 8305", "nodes: true", "nodes is True: true and false are for switches only"),
        ("nodes: 8305", "nods: 8305", "did you mean nodes"),
        ("  latency_seconds", "  latency", "did you mean network.latency_seconds"),
        ("  cores_per_socket", "  cores_a_socket", "did you mean node.cores_per_socket"),
        ("memory_gb: 96", "memory_gb: true", "node.memory_gb is True"),
        ("resnet50: 79", "resnet50: 0", "images_per_second.resnet50 is 0"),
        ("mode: cache", "modus: cache", "did you mean node.fast_memory.mode"),
        ("mode: cache", "mode: hybrid", "node.fast_memory.mode is 'hybrid'"),
        ("  latency_seconds: 1.0e-6", "  latency_seconds: 0", "network.latency_seconds is 0"),
        ("  cores_per_socket: 68", "", "give sockets and cores_per_socket"),
        ("name: nurion-knl", "name: [", "line"),
    ],
)
def test_mistakes_are_one_sentence(old: str, new: str, part: str, tmp_path: Path) -> None:
    text = find_site("nurion-knl").read_text()
    assert old in text
    (tmp_path / "site.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=part) as caught:
        load_site(str(tmp_path / "site.yaml"))
    assert "\n" not in str(caught.value) and "site.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("like", "keys", "part"),
    [
        ("nurion-knl", {"launcher": "srun"}, "launcher srun does not go with scheduler pbs; choose mpirun"),
        ("nurion-knl", {"launcher": "mpiexc"}, "launcher is 'mpiexc'"),
        ("nurion-knl", {"scheduler": "lsf"}, "scheduler is 'lsf'"),
        ("nurion-knl", {"srun_mpi": "pmix"}, "srun_mpi is pmix but the launcher is mpirun; leave srun_mpi out"),
        ("nurion-knl", {"node": None}, "node is not set; give its sockets, cores_per_socket and threads_per_core"),
        ("nurion-knl", {"threads_per_core_used": 2}, "threads_per_core_used is 2 but a core has 1"),
        ("crux", {"threads_per_core_used": 2}, "leave threads_per_core_used at 1"),
        ("nurion-knl", {"reserved_cores": 68}, "reserved_cores is 68 and leaves none of the 68 cores"),
        ("frontera", {"default_partition": "norml"}, "default_partition norml is not one of the partitions: normal, "),
        ("frontera", {"select": "system=frontera"}, "select is for the scheduler pbs"),
        ("frontera", {"partitions": {"normal": {"max_walltime": 172800}}}, 'a time "HH:MM:SS"; put it in quotes'),
        ("frontera", {"partitions": {"normal": {"max_walltime": "2 days"}}}, 'a time "HH:MM:SS"'),
        ("frontera", {"environment": {"KMP_BLOCKTIME": 1}}, "environment.KMP_BLOCKTIME is 1: .* put it in quotes"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(like: str, keys: Any, part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=part) as caught:
        load_site(changed(tmp_path, like, keys))
    assert "\n" not in str(caught.value) and "site.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "a; rm -rf ~"},
        {"name": "-rf"},
        {"description": "two\nlines"},
        {"source": "two\rlines"},
        {"environment": {"A": "1\nrm"}},
        {"environment": {"A=1;B": "1"}},
        {"environment": {"": "1"}},
        {"setup": ["module load gcc\nrm"]},
        {"directives": ["-q normal\nrm -rf ~"]},
        {"directives": ["#PBS -q normal"]},
        {"directives": ["normal"]},
        {"directives": ["- q"]},
        {"directives": ["-"]},
        {"default_partition": "normal queue"},
        {"default_partition": "$(rm)"},
        {"partitions": {"a b": {}}},
        {"node_local": "relative/folder"},
        {"node_local": "/tmp/$(rm)"},
        {"node_local": "/tmp/`rm`"},
        {"node_local": "/tmp/a b"},
        {"node_local": '/tmp/"'},
        {"node_local": "/tmp/../etc"},
        {"node_local": "${TMPDIR:-$(rm)}"},
        {"node_local": "${TMPDIR:?rm}"},
        {"node_local": "/tmp\n"},
        {"numactl": ["--preferred=1; rm"]},
        {"numactl": ["--preferred 1"]},
        {"select": "system=a b"},
        {"select": "system"},
        {"srun_mpi": "pmix --x"},
    ],
)
def test_nothing_in_a_profile_can_leave_its_line(keys: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected"):
        load_site(changed(tmp_path, "nurion-knl", keys))


@pytest.mark.parametrize(
    "folder", ["/tmp", "$TMPDIR", "${TMPDIR}/x", "${TMPDIR:-/tmp}", "/local/$USER/a-b_c.d", "/scratch/${PBS_JOBID}"]
)
def test_folders_may_hold_variables(folder: str, tmp_path: Path) -> None:
    assert load_site(changed(tmp_path, "nurion-knl", {"node_local": folder})).node_local == folder


@given(st.text(max_size=20))
def test_a_directive_is_one_line_that_begins_with_a_dash(text: str) -> None:
    values = yaml.safe_load(find_site("nurion-knl").read_text())
    try:
        site = Site.model_validate({**values, "directives": [f"-l {text}"], "environment": {"A": text}})
    except ValidationError:
        assert re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", text)
    else:
        assert site.directives[0].splitlines() == [f"-l {text}"]
        assert site.environment["A"].splitlines() in ([text], [])


def test_a_profile_for_planning_alone_needs_no_node() -> None:
    values = yaml.safe_load(find_site("nurion-knl").read_text())
    keys = ("name", "description", "source", "nodes", "network", "images_per_second")
    site = Site.model_validate({key: values[key] for key in keys})
    assert (site.scheduler, site.node.nominal, site.images_per_second["resnet50"]) == ("local", True, 79)


HOUR = 3600


@pytest.mark.parametrize(
    ("site", "nodes", "seconds", "asked", "partition"),
    [
        ("stampede2-knl", 2, HOUR, None, "normal"),
        ("stampede2-knl", 256, 48 * HOUR, None, "normal"),
        ("stampede2-knl", 2048, HOUR, None, "large"),  # by itself: 2 nodes and 2,048 are the same command
        ("stampede2-knl", 32, 49 * HOUR, None, "long"),
        ("stampede2-knl", 2, HOUR, "development", "development"),
        ("stampede2-knl", 2, HOUR, "reserved-for-us", "reserved-for-us"),  # not in the profile: the scheduler knows
        ("frontera", 512, HOUR, None, "normal"),
        ("frontera", 513, HOUR, None, "large"),
        ("nurion-knl", 2048, 999 * HOUR, None, "normal"),  # a queue whose limits are not known
        ("generic-slurm", 2048, 999 * HOUR, None, None),
    ],
)
def test_the_partition_of_a_job(site: str, nodes: int, seconds: int, asked: str | None, partition: str | None) -> None:
    assert partition_for(load_site(site), nodes, seconds, asked) == (partition, None)


@pytest.mark.parametrize(
    ("site", "nodes", "seconds", "asked", "partition", "sentence"),
    [
        (
            "stampede2-knl-flat",
            33,
            HOUR,
            None,
            "flat-quadrant",
            "33 nodes for 1 h is beyond the limits that stampede2-knl-flat has: flat-quadrant takes 1 to 32 nodes",
        ),
        (
            "stampede2-knl",
            17,
            HOUR,
            "development",
            "development",
            "17 nodes for 1 h is beyond the limits that stampede2-knl has: development takes 1 to 16 nodes",
        ),
        (
            "crux",
            1,
            73 * HOUR,
            None,
            "preemptable",  # the longest
            "1 node for 73 h is beyond the limits that crux has: workq-route takes up to 24:00:00; "
            "debug takes up to 02:00:00; preemptable takes up to 72:00:00",
        ),
        (
            "crux",
            513,
            HOUR,
            None,
            "workq-route",  # the widest
            "crux has 512 nodes, not 513; ask for fewer, or set nodes in a profile of your own",
        ),
        (
            "generic-pbs",
            100_001,
            HOUR,
            None,
            None,
            "generic-pbs has 100,000 nodes, not 100,001; ask for fewer, or set nodes in a profile of your own",
        ),
        (
            "frontera",
            2,
            HOUR,
            "large",
            "large",
            "2 nodes for 1 h is beyond the limits that frontera has: large takes 513 to 2,048 nodes",
        ),
    ],
)
def test_jobs_beyond_the_limits(
    site: str, nodes: int, seconds: int, asked: str | None, partition: str | None, sentence: str
) -> None:
    assert partition_for(load_site(site), nodes, seconds, asked) == (partition, sentence)


def test_the_guide_names_every_key_and_every_profile() -> None:
    text = GUIDE.read_text()
    for model in (Site, Network, Node, FastMemory, Partition):
        missing = [key for key in model.model_fields if f"`{key}`" not in text and f"`{key}: " not in text]
        assert not missing, model.__name__
    profiles = text.partition("| profile |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `([a-z0-9-]+)`", profiles, re.MULTILINE)) == site_names()


def test_an_unknown_site_lists_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean nurion-knl"):
        load_site("nurion")
    with pytest.raises(UserError, match="hpctrain sites"):
        load_site("nowhere.yaml")


def test_jobs_import_no_tensorflow() -> None:
    import subprocess

    code = "import sys, hpctrain.jobs.site; assert not {'tensorflow', 'keras', 'mpi4py'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
