"""Where the job templates are: in a checkout's slurm/ and pbs/, or in PREFIX/share/hpctrain of an installation."""

import sys
from pathlib import Path

from hpctrain.data.atomic import make_folder, write_file
from hpctrain.errors import UserError, nearest

SUFFIXES = {"slurm": ".sbatch", "pbs": ".pbs"}


def template_root() -> Path:
    """Return the folder that holds slurm/ and pbs/. Raises UserError if the installation has none."""
    for folder in (Path(__file__).parents[2], Path(sys.prefix) / "share" / "hpctrain"):
        if (folder / "slurm" / "train.sbatch").is_file():
            return folder
    raise UserError(
        f"the job templates are neither in {Path(__file__).parents[2]} nor in {sys.prefix}/share/hpctrain; "
        "install hpctrain again with install.sh"
    )


def template_files() -> list[Path]:
    """Return all templates, sorted."""
    root = template_root()
    return sorted(path for folder, suffix in SUFFIXES.items() for path in (root / folder).glob(f"*{suffix}"))


def read_template(scheduler: str, kind: str) -> str:
    """Return the text of a template, such as ("slurm", "train"). Raises UserError with the nearest names."""
    path = template_root() / scheduler / f"{kind}{SUFFIXES[scheduler]}"
    if not path.is_file():
        names = [p.stem for p in template_files() if p.parent.name == scheduler]
        raise UserError(f"there is no {scheduler} template named {kind!r}; {nearest(kind, names)}")
    return path.read_text(encoding="utf-8")


def copy_templates(destination: Path) -> list[Path]:
    """Copy all templates to `destination`/slurm and /pbs and return the new files. Raises UserError if one is there."""
    files = template_files()
    targets = [destination / path.parent.name / path.name for path in files]
    for target in targets:
        if target.exists():
            raise UserError(f"{target} is there already and may hold your changes; give another folder or move it away")
    for source, target in zip(files, targets, strict=True):
        make_folder(target.parent)
        try:
            write_file(target, source.read_bytes())
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}; give another folder") from None
    return targets
