"""Configurations, checkpoints and data sets run no code, in any way that Python or Keras offers for it."""

import ast
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from hpctrain.config import load_config
from hpctrain.errors import UserError

PACKAGE = Path(__file__).parents[2] / "hpctrain"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "data_prep").glob("*.py")])

# Calls that may run what a file says, and the only places that may have them.
FORBIDDEN = {
    r"(pickle|cPickle|dill|marshal|shelve|joblib|jsonpickle)\..*": "nothing is unpickled from a file",
    r"eval|exec|compile|__import__": "no text is run as code",
    r"os\.(system|popen)": "no shell",
    r"(yaml\.)(load_all|unsafe_load.*|full_load.*|Loader|UnsafeLoader|FullLoader)": "only the strict loader",
    r"(.*\.)?(load_model|model_from_json|model_from_config|deserialize_keras_object|clone_model)": "no saved models",
    r"(.*\.)?enable_unsafe_deserialization": "no lambdas",
    r"(.*\.)?saved_model\.load": "no saved models",
    r"np\.(loadtxt|genfromtxt|fromregex|savetxt)": "np.load without pickles only",
    r"tempfile\.mktemp": "a name that somebody else may take first",
}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_the_sources_hold_no_call_that_runs_what_a_file_says(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    }
    assert not imported & {"pickle", "marshal", "dill", "shelve", "joblib"}
    for name, call in calls(tree):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if (path.name, name) == ("exclusion.py", "keras.saving.deserialize_keras_object"):
            continue  # of an optimizer that Keras loads with a model of the user's; no configuration gets there
        for pattern, why in FORBIDDEN.items():
            assert not re.fullmatch(pattern, name), f"{path}:{call.lineno}: {name}: {why}"
        if name.endswith(("np.load", "numpy.load")):
            assert keywords.get("allow_pickle") == "False", f"{path}:{call.lineno}: np.load with allow_pickle"
        if name.startswith("subprocess."):
            assert "shell" not in keywords, f"{path}:{call.lineno}: a shell"
        if name == "yaml.load":
            assert [ast.unparse(argument) for argument in call.args[1:]] == ["StrictLoader"]


def test_code_is_imported_by_name_in_one_place_only() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), ast.unparse(call.args[0]))
        for path in SOURCES
        if path.is_relative_to(PACKAGE)
        for name, call in calls(ast.parse(path.read_text()))
        if name.endswith("import_module")
    }
    # The others import what this package's own tables name.
    assert {place for place, _ in found} == {"_lazy.py", "cli.py", "models/registry.py"}
    assert ("models/registry.py", "module_name") in found


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch pwned']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object/new:type ['x', [], {}]",
        "!!bool pwned",
        "!!timestamp pwned",
        "!!binary eA==",
        "!!set {a}",
        "!x y",
    ],
)
def test_tags_are_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: x\nmodel: {text}\n")
    with pytest.raises(UserError, match="tags such as"):
        load_config(path)
    with pytest.raises(UserError):
        load_config("demo", [f"model={text}"])
    with pytest.raises(UserError):
        load_config("demo", [f"train.steps={text}"])
    assert list(tmp_path.iterdir()) == [path]


class Bomb:
    """Something whose pickle runs code when it is read."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("pwned"),))


def test_checkpoints_with_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = np.empty(1, object)
    bomb[0] = Bomb()
    np.savez(tmp_path / "bomb.npz", x=bomb)
    with np.load(tmp_path / "bomb.npz", allow_pickle=True) as file:
        file["x"]  # the test's own check: it is a bomb
    assert (tmp_path / "pwned").exists()
    (tmp_path / "pwned").unlink()
    with np.load(tmp_path / "bomb.npz", allow_pickle=False) as file, pytest.raises(ValueError, match="pickle"):
        file["x"]
    assert not (tmp_path / "pwned").exists()


def test_training_does_not_open_hdf5() -> None:
    """What reads shards while training knows nothing of h5py: a crafted file cannot reach the HDF5 library there."""
    reached: set[str] = set()
    waiting = ["hpctrain.training.loop", "hpctrain.training.standalone", "hpctrain.staging.shards"]
    waiting += ["hpctrain.data.info", "hpctrain.data.pipeline"]
    while waiting:
        module = waiting.pop()
        if module in reached:
            continue
        reached.add(module)
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            continue
        for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "h5py" for name in names), module
            waiting += [name for name in names if name.startswith("hpctrain.") and _is_module(name)]
    assert "hpctrain.data.reader" in reached and "hpctrain.data.hdf5" not in reached


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, AttributeError):
        return False
