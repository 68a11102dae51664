"""Whatever text a user gives for a job: it is refused, or arrives as it was, and nothing else runs."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.jobs.render import setting_names
from hpctrain.jobs.site import find_site, load_site
from hpctrain.jobs.submission import Request, prepare
from hpctrain.jobs.templates import read_template

SYNTHETIC = ("data.synthetic=true", "model.num_classes=10", "train.global_batch=65536", "train.micro_batch=4")
SHELL = "$`'\"\\!*?[]{}()<>|&;~#%=:,. -\t\n\r\0\x1b\x85\u2028\u2029aB1/é"
TEXT = st.one_of(
    st.text(SHELL, max_size=20),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(
        [
            "$(touch pwned)",
            "`touch pwned`",
            "';touch pwned;'",
            '"; touch pwned; "',
            "}; touch pwned; ${x-",
            "x\n#SBATCH --uid=0",
            "x\n#PBS -W umask=0",
            "x\ntouch pwned",
            "-rf",
            "--wrap=touch pwned",
            "../../x",
            "\\\ntouch pwned",
            "\u0661",
        ]
    ),
)


def values_in_bash(script: str, names: list[str], folder: Path) -> dict[str, str]:
    """The settings of a script as bash understands them, in a folder where nothing may appear."""
    block = script[script.index("# ---- settings") : script.index("# ---- end of settings")]
    print_all = "".join(f'\nprintf "%s\\0" "${name}"' for name in names)
    done = subprocess.run(
        ["bash", "-c", block + print_all], env={"PATH": "/usr/bin:/bin"}, cwd=folder, capture_output=True, timeout=20
    )
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert list(folder.iterdir()) == [], "something ran"
    values = done.stdout.decode().split("\0")
    assert len(values) == len(names) + 1
    return dict(zip(names, values, strict=False))


def directives(script: str, mark: str) -> list[str]:
    return [line for line in script.split("\n") if line.startswith(mark)]


@given(
    scheduler=st.sampled_from(["slurm", "pbs"]),
    which=st.sampled_from(["account", "partition", "name", "run_dir", "recipe", "override", "description", "walltime"]),
    text=TEXT,
)
@settings(max_examples=150)
def test_any_text_anywhere(scheduler: str, which: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("empty")
    recipe, overrides = "demo", list(SYNTHETIC)
    fields: dict[str, Any] = {}
    if which == "recipe":
        recipe = text
    elif which == "override":
        overrides.append(text)
    elif which == "description":
        overrides.append(f"description={text}")
    elif which == "run_dir":
        fields = {"run_dir": Path("/runs") / text.lstrip("/")}
    else:
        fields = {which: text}
    site = load_site(f"generic-{scheduler}")
    try:
        job = prepare(Request(recipe, tuple(overrides), 2, cores=4, **fields), site)
    except UserError:
        return
    values = values_in_bash(job.script, setting_names(read_template(scheduler, "train")), folder)
    assert values["RUN_DIR"] == str(job.run_dir)
    assert values["RECIPE"] == recipe
    lines = [line.removeprefix("  ") for line in values["OVERRIDES"].split("\n") if line]
    assert lines[: len(overrides)] == overrides
    # The directives are the template's own, with other values: none more, none on a second line.
    mark = {"slurm": "#SBATCH", "pbs": "#PBS"}[scheduler]
    allowed = directives(read_template(scheduler, "train"), f"{mark} ")
    allowed += [line.removeprefix("#") for line in directives(read_template(scheduler, "train"), f"#{mark} ")]
    assert len(directives(job.script, f"{mark} ")) <= len(allowed) + len(site.directives)
    for line in directives(job.script, f"{mark} "):
        option = re.split(r"[= ]", line.removeprefix(f"{mark} ").removeprefix("-l "))[0]
        assert any(option in known for known in [*allowed, *site.directives]), line
        assert not set(line) & set("`$\\\n\r"), line
    begin = job.script.index("# ---- settings")
    assert job.script[begin + len("# ---- end of settings") :].count("set -euo pipefail") == 1


@pytest.mark.parametrize("text", ["x y", "a;b", "$(id)", "a\n", "-x", "", "\u0661", "a`b", "a'b"])
@pytest.mark.parametrize("field", ["account", "partition", "name"])
def test_words_of_directives_are_plain(field: str, text: str) -> None:
    if field == "name" and text == "":
        pytest.skip("no name is the recipe's")
    with pytest.raises(UserError, match="expected letters, digits"):
        fields: dict[str, Any] = {field: text}
        prepare(Request("demo", SYNTHETIC, 1, cores=1, **fields), load_site("generic-slurm"))


@pytest.mark.parametrize(
    "text", ["01:00:00\n", "\u0660\u0661:\u0660\u0660:\u0660\u0660", "1:00", "01:00:00;id", "99999:00:00"]
)
def test_walltimes_are_digits(text: str) -> None:
    with pytest.raises(UserError, match="expected HH:MM:SS"):
        prepare(Request("demo", SYNTHETIC, 1, walltime=text, cores=1), load_site("generic-slurm"))


def test_launch_words_of_a_site_are_made_of_its_checked_fields(tmp_path: Path) -> None:
    """The words that start the ranks come from a fixed table; a profile adds numbers, and names without spaces."""
    good = find_site("generic-slurm").read_text()
    path = tmp_path / "site.yaml"
    for line in (
        "launcher: bash -c id",
        "launcher: ../x",
        "srun_mpi: 'pmix --export=ALL'",
        "srun_mpi: pmix;id",
        "numactl: ['--membind=0 id']",
        "numactl: [$(id)]",
        "numactl: ['-C', '0;id']",
        "node_local: /tmp/$(id)",
        "node_local: /tmp/../etc",
        "node_local: relative",
        "environment: {'A;id': x}",
        'environment: {A: "x\\ny"}',
        'directives: ["-C x\\n#SBATCH --uid=0"]',
        "directives: ['C x']",
        "select: 'a=b;id'",
        "default_partition: 'a b'",
    ):
        key = line.split(":")[0]
        kept = [row for row in good.split("\n") if not row.startswith(f"{key}:")]
        path.write_text("\n".join([*kept, line]))
        with pytest.raises(UserError):
            load_site(str(path))
