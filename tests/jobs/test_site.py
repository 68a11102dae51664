"""Site profiles load, and mistakes in one are told in a sentence."""

import sys
from pathlib import Path

import pytest

from hpctrain.errors import UserError
from hpctrain.jobs.site import find_site, load_site, own_folder, site_names


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


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("nodes: 8305", "nodes: many", "nodes is 'many'"),
        ("nodes: 8305", "node: 8305", "did you mean nodes"),
        ("  latency_seconds", "  latency", "did you mean network.latency_seconds"),
        ("  latency_seconds: 1.0e-6", "  latency_seconds: 0", "network.latency_seconds is 0"),
        ("name: nurion-knl", "name: [", "line"),
    ],
)
def test_mistakes_are_one_sentence(old: str, new: str, part: str, tmp_path: Path) -> None:
    text = find_site("nurion-knl").read_text()
    assert old in text
    (tmp_path / "site.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=part) as caught:
        load_site(str(tmp_path / "site.yaml"))
    assert "\n" not in str(caught.value)


def test_an_unknown_site_lists_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean nurion-knl"):
        load_site("nurion")
    with pytest.raises(UserError, match="hpctrain sites"):
        load_site("nowhere.yaml")


def test_jobs_import_no_tensorflow() -> None:
    import subprocess

    code = "import sys, hpctrain.jobs.site; assert not {'tensorflow', 'keras', 'mpi4py'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
