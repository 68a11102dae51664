"""Job scripts: a template with other values, and nothing a user gives becomes shell or a directive of its own."""

import difflib
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.jobs import render
from hpctrain.jobs.site import load_site
from hpctrain.jobs.submission import Request, prepare
from hpctrain.jobs.templates import copy_templates, read_template, template_files

SYNTHETIC = ("data.synthetic=true", "model.num_classes=10", "train.global_batch=65536", "train.micro_batch=4")
SHELLCHECK = shutil.which("shellcheck")


def check_shell(script: str, tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(script)
    subprocess.run(["bash", "-n", path], check=True)
    if SHELLCHECK:
        done = subprocess.run([SHELLCHECK, "-s", "bash", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def changed_lines(template: str, script: str) -> list[str]:
    """The lines of the script that are not the template's."""
    diff = difflib.ndiff(template.split("\n"), script.split("\n"))
    return [line[2:] for line in diff if line.startswith("+ ")]


@pytest.mark.parametrize("path", template_files(), ids=lambda path: path.name)
def test_templates_are_sound_shell(path: Path, tmp_path: Path) -> None:
    check_shell(path.read_text(), tmp_path)
    if SHELLCHECK is None:
        pytest.skip("shellcheck is not installed; bash -n found nothing")


def test_a_slurm_script_is_the_template_with_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.prefix", "/opt/hpctrain")
    site = load_site("cori-knl")
    request = Request("demo", (*SYNTHETIC, "train.steps=20"), 4, "02:30:00", account="m123", run_dir=Path("/r/un"))
    script = prepare(request, site).script
    changes = changed_lines(read_template("slurm", "train"), script)
    for line in (
        "#SBATCH --job-name=demo",
        "#SBATCH --nodes=4",
        "#SBATCH --time=02:30:00",
        "#SBATCH --account=m123",
        "#SBATCH --output=/r/logs/demo-%j.out",
        *(f"#SBATCH {directive}" for directive in site.directives),
        "RUN_DIR=${RUN_DIR-/r/un}",
        "HPCTRAIN_PREFIX=${HPCTRAIN_PREFIX-/opt/hpctrain}",
        "OVERRIDES=${OVERRIDES-'",
        "  train.steps=20",
    ):
        assert line in changes, line
    own = r"#SBATCH -.+|[A-Z_]+=\$\{[A-Z_]+-.*|  \S+=.*|  module .*|'\}"
    assert [line for line in changes if not re.fullmatch(own, line)] == []


@pytest.mark.parametrize(
    ("site", "with_cores", "without"),
    [
        ("generic-slurm", "#SBATCH --cpus-per-task=32", "#SBATCH --cpus-per-task=1"),
        ("generic-pbs", "select=2:ncpus=64:mpiprocs=2:ompthreads=32", "select=2:ncpus=2:mpiprocs=2:ompthreads=1"),
    ],
)
def test_a_generic_site_is_told_its_cores(site: str, with_cores: str, without: str) -> None:
    request = Request("demo", SYNTHETIC, 2, ranks_per_node=2, cores=64)
    script = prepare(request, load_site(site)).script
    assert with_cores in script and "  train.threads=32\n" in script
    script = prepare(replace(request, cores=None), load_site(site)).script
    assert without in script and "train.threads" not in script


def test_a_pbs_script_is_the_template_with_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    request = Request("demo", SYNTHETIC, 2048, "10:00:00", account="tf", partition="normal", run_dir=Path("/r/un"))
    changes = changed_lines(read_template("pbs", "train"), prepare(request, load_site("nurion-knl")).script)
    for line in (
        "#PBS -N demo",
        "#PBS -l select=2048:ncpus=68:mpiprocs=1:ompthreads=64",
        "#PBS -l walltime=10:00:00",
        "#PBS -A tf",
        "#PBS -q normal",
        "#PBS -o /r/logs/",
        "#PBS -V",
        "LOG_DIR=${LOG_DIR-/r/logs}",
    ):
        assert line in changes, line


def setting_in_bash(script: str, name: str) -> str:
    block = script[script.index("# ---- settings") : script.index("# ---- end of settings")]
    done = subprocess.run(
        ["bash", "-c", block + f"\nprintf '%s' \"${name}\""], env={}, capture_output=True, check=True, timeout=20
    )
    return done.stdout.decode()


HOSTILE = [
    "a b",
    "it's",
    'say "x"',
    "$(touch pwned)",
    "`touch pwned`",
    "a}b",
    "${HOME}",
    "!!",
    "*",
    "~root",
    "-n",
    "ü\\n",
]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("scheduler", ["slurm", "pbs"])
def test_bash_reads_hostile_settings_as_they_were_given(value: str, scheduler: str) -> None:
    script = render.render(read_template(scheduler, "train"), scheduler, {}, [], {"RUN_DIR": value})
    assert setting_in_bash(script, "RUN_DIR") == value
    assert setting_in_bash(script, "RECIPE") == "demo"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30))
def test_bash_reads_any_setting_as_it_was_given(value: str) -> None:
    script = render.render(read_template("slurm", "train"), "slurm", {}, [], {"OVERRIDES": value})
    assert setting_in_bash(script, "OVERRIDES") == value


@pytest.mark.parametrize("value", ["a\nb", "a\r#SBATCH --x", "a\x1bb"])
def test_a_directive_or_item_is_one_line(value: str) -> None:
    with pytest.raises(UserError, match="one line"):
        render.render(read_template("slurm", "train"), "slurm", {"--account": value}, [], {})
    with pytest.raises(UserError, match="one line"):
        render.render(read_template("slurm", "train"), "slurm", {}, [f"-C {value}"], {})
    with pytest.raises(UserError, match="one line"):
        render.lines_value([value], "an override")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"account": "a b"}, "the account is 'a b'"),
        ({"account": "x --wrap=ls"}, "the account"),
        ({"partition": "$(ls)"}, "the partition"),
        ({"name": "a;b"}, "the job's name"),
        ({"name": "-rf"}, "the job's name"),
        ({"walltime": "90"}, "HH:MM:SS"),
        ({"walltime": "1:60:00"}, "HH:MM:SS"),
        ({"walltime": "00:00:00"}, "HH:MM:SS"),
        ({"walltime": "00:01:00"}, "leaves no time to train"),
        ({"nodes": 3}, "does not divide over 3 ranks"),
        ({"run_dir": Path("/a\nb")}, "one line"),
        ({"run_dir": Path('/a"b/c')}, "give another --run-dir"),
        ({"overrides": (*SYNTHETIC, "model.name=a:b\nc")}, "one line"),
        ({"overrides": ("data.path=/nowhere",)}, "/nowhere"),
        ({"stage_env": Path("env\n.tar")}, "one line"),
    ],
)
def test_mistakes_are_told_in_a_sentence(change: dict[str, object], sentence: str) -> None:
    values: dict[str, object] = {"recipe": "demo", "overrides": SYNTHETIC, "nodes": 2, **change}
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        prepare(Request(**values), load_site("generic-slurm"))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_names_are_cut_or_refused_for_pbs() -> None:
    site = load_site("generic-pbs")
    assert "#PBS -N resnet50-lars-3\n" not in read_template("pbs", "train")
    with pytest.raises(UserError, match="15 characters"):
        prepare(Request("demo", SYNTHETIC, 1, name="a-name-that-is-too-long"), site)
    with pytest.raises(UserError, match="beginning with a letter, as PBS wants it"):
        prepare(Request("demo", SYNTHETIC, 1, name="3rd-run"), site)
    assert (
        "--job-name=3rd-run"
        in prepare(Request("demo", SYNTHETIC, 1, name="3rd-run"), load_site("generic-slurm")).script
    )


def test_too_few_shards_for_the_partitions(make_dataset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = make_dataset(records=64, shards=2)[0].parent
    overrides = (f"data.path={folder}", "data.partitions=4")
    with pytest.raises(UserError, match="2 shards, too few for"):
        prepare(Request("demo", overrides, 2), load_site("generic-slurm"))
    script = prepare(Request("demo", (overrides[0], "data.partitions=2"), 2), load_site("generic-slurm")).script
    assert setting_in_bash(script, "DATA") == str(folder)
    assert setting_in_bash(script, "PARTITIONS") == "2"
    next(folder.glob("train/*.h5")).unlink()
    with pytest.raises(UserError, match="cannot be opened"):
        prepare(Request("demo", overrides[:1], 2), load_site("generic-slurm"))


def test_staging_takes_the_sites_folder_with_its_variables() -> None:
    job = prepare(Request("demo", SYNTHETIC, 2, stage=True), load_site("generic-slurm"))
    assert 'STAGE_DIR=${STAGE_DIR-"${TMPDIR:-/tmp}"}' in job.script
    assert setting_in_bash(job.script, "STAGE_DIR") == "/tmp"
    for text in ("$(ls)", "/a b", '/a"', "/a;ls", "${X:-$(ls)}"):
        with pytest.raises(UserError):
            render.Expanded(text)


def test_copies_are_the_templates_and_replace_nothing(tmp_path: Path) -> None:
    copies = copy_templates(tmp_path)
    assert [path.read_bytes() for path in copies] == [path.read_bytes() for path in template_files()]
    copies[0].write_text("mine")
    copies[1].unlink()
    with pytest.raises(UserError, match="is there already"):
        copy_templates(tmp_path)
    assert copies[0].read_text() == "mine" and not copies[1].exists()
