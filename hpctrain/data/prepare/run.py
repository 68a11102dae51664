"""`prepare`: from an input of images to a finished split, alone or on many ranks, resuming what was interrupted."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from hpctrain import __version__
from hpctrain.data.atomic import write_file
from hpctrain.data.manifest import Manifest
from hpctrain.data.prepare.group import Alone, Group, on_all, on_first
from hpctrain.data.prepare.plan import Encoding, Plan, difference, make_plan
from hpctrain.data.prepare.sources import ImageSource, open_source
from hpctrain.data.prepare.sources.labels import read_class_list
from hpctrain.data.prepare.work import SHOWN, ShardOutcome, ShardTask, make_shard
from hpctrain.data.processes import Progress, available_cores, run_tasks
from hpctrain.data.shard import MANIFEST_NAME, DataError, check_split_name
from hpctrain.data.writer import remove_other_shards, start_split
from hpctrain.errors import UserError

_STATE_NAME = ".prepare.json"  # which images an interrupted run found to be bad

Echo = Callable[[str], None]


def prepare(
    input_path: str | Path,
    output: str | Path,
    split: str,
    *,
    shards: int | None = None,
    shard_mb: float | None = None,
    resize: int | None = None,
    quality: int = 90,
    raw: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    labels: str | Path | None = None,
    classes: str | Path | None = None,
    decode: bool = False,
    skip_bad: bool = False,
    overwrite: bool = False,
    source: ImageSource | None = None,
    group: Group | None = None,
    echo: Echo | None = None,
    quiet: bool = False,
) -> Manifest:
    """Make the data set `output`/`split` from `input_path` (or another `source`) and return its manifest.

    The input is a folder of class folders, a tar of tars, of class folders or of images, a folder of class tars, or
    TFRecords; `labels` (ImageNet's development kit or a labels file) tells the classes of images without class
    folders. Labels are numbers in the class list: that of the file `classes`, of the other split of the same output,
    or the classes of the input sorted by name.

    JPEG files are kept byte for byte unless `resize` (pixels of the shorter side) makes them smaller; `raw` stores
    uint8[raw, raw, 3] instead. The order is a global shuffle by `seed`. The shards are the same, byte for byte,
    whatever the number of `workers` (processes; by default one a core, or one a rank) and ranks in `group`. A rerun
    after an interruption keeps the shards that were finished. Damaged images end the run with a UserError after all
    have been listed, or are left out with `skip_bad`; of JPEGs that are kept only header and end are looked at, unless
    `decode` asks for all of them to be decoded. `echo` gets lines for the user.
    """
    group = group or Alone()
    say = _speaker(group, echo, quiet)
    workers = workers if workers is not None else (available_cores() if group.size == 1 else 1)
    if workers < 1:
        raise UserError(f"--workers is {workers}; expected 1 or more")
    encoding = Encoding(resize, quality, raw)
    folder = Path(output) / check_split_name(split)
    if source is not None and labels is not None:
        raise UserError("labels go with an input path, not with a source, which knows its classes")

    def start() -> tuple[ImageSource, Plan, Manifest | None]:
        images = source
        if images is None:
            images = open_source(Path(input_path), split, _path(labels), _path(classes))
        say(f"listing {input_path or 'the images'} ({images.kind})")
        plan = _plan(images, folder, split, encoding, seed, shards, shard_mb, classes, say)
        return images, *_start(plan, overwrite, skip_bad, say)

    images, plan, finished = on_first(group, start)
    if finished is not None:
        say(f"{folder} is complete already: {finished.num_records:,} records in {len(finished.shards)} shards")
        if decode:
            say(f"no image was decoded; `hpctrain data verify --decode {folder}` decodes those of the shards")
        return finished
    while True:
        outcomes = _make_shards(plan, images, decode, workers, group, quiet)
        bad = sorted(item for outcome in outcomes for item in outcome.bad)
        if not bad:
            break
        for name, reason in bad[:SHOWN]:
            say(f"bad image {name}: {reason}")
        if len(bad) > SHOWN:
            say(f"... and {len(bad) - SHOWN} more")
        if not skip_bad:
            raise UserError(
                f"{len(bad)} of {len(plan.images)} images cannot be decoded, the first is {bad[0][0]}; mend or remove "
                "them, or leave them out with --skip-bad"
            )
        plan = plan.without(name for name, _ in bad)
        # Records move up when others are left out, so that shards already made are made again.
        state = json.dumps({"key": plan.key, "skipped": plan.skipped}).encode()
        on_first(group, lambda: write_file(folder / _STATE_NAME, state))  # noqa: B023 (called at once)
    return on_first(group, lambda: _finish(plan, outcomes, say))


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _speaker(group: Group, echo: Echo | None, quiet: bool) -> Echo:
    if group.rank != 0 or quiet:
        return lambda line: None
    return echo or (lambda line: print(line, file=sys.stderr, flush=True))


def _plan(
    source: ImageSource,
    folder: Path,
    split: str,
    encoding: Encoding,
    seed: int,
    shards: int | None,
    shard_mb: float | None,
    classes: str | Path | None,
    say: Echo,
) -> Plan:
    listing = source.list_images()
    for note in listing.notes:
        say(note)
    class_names, classes_from = _class_list(folder, split, classes)
    plan = make_plan(listing, source.kind, folder, split, encoding, seed, shards, shard_mb, class_names, classes_from)
    total = int(plan.images.num_bytes.sum())
    say(
        f"{len(plan.images):,} images ({total / 1e6:,.1f} MB) of {len(plan.class_names):,} classes "
        f"go into {plan.num_shards} shards"
    )
    missing = len(plan.class_names) - len(np.unique(plan.labels))
    if missing:
        say(f"{missing} of the {len(plan.class_names)} classes in {classes_from} have no images here")
    return plan


def _class_list(folder: Path, split: str, classes: str | Path | None) -> tuple[list[str] | None, str]:
    """The classes that the labels must follow, and where they come from: a file, or the other split if it exists."""
    other = folder.parent / ("val" if split == "train" else "train")
    names, origin = None, "the input"
    if (other / MANIFEST_NAME).exists():
        names, origin = list(Manifest.load(other).class_names), str(other)
    if classes is None:
        return names, origin
    given = read_class_list(Path(classes))
    if names is not None and given != names:
        raise UserError(f"the class list {classes} is not that of {other}; splits of one data set share their classes")
    return given, str(classes)


def _start(plan: Plan, overwrite: bool, skip_bad: bool, say: Echo) -> tuple[Plan, Manifest | None]:
    """Look at what the folder holds: return a finished data set, or the plan to go on with in a folder made ready."""
    folder = plan.folder
    if (folder / MANIFEST_NAME).exists() and not overwrite:
        manifest = Manifest.load(folder)
        if manifest.prepare.get("key") != plan.key:
            what = difference(manifest.prepare, plan.options)
            raise UserError(
                f"{folder} already holds a data set made with other options ({what}); give another output, or "
                "replace it with --overwrite"
            )
        try:
            manifest.check_files(folder)
            return plan, manifest
        except DataError as error:
            say(f"{error}: made again now")
    state = _read_state(folder)
    is_replaced = overwrite and (folder / MANIFEST_NAME).exists()  # else an interrupted run, which goes on
    start_split(folder, overwrite=True)
    if is_replaced:
        remove_other_shards(folder, plan.split, keep=set())
        (folder / _STATE_NAME).unlink(missing_ok=True)
        return plan, None
    skipped = state.get("skipped")
    if skip_bad and state.get("key") == plan.key and isinstance(skipped, list):
        plan = plan.without(str(name) for name in skipped)
    remove_other_shards(folder, plan.split, keep={plan.file(shard) for shard in range(plan.num_shards)})
    return plan, None


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / _STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _make_shards(
    plan: Plan, source: ImageSource, decode: bool, workers: int, group: Group, quiet: bool
) -> list[ShardOutcome]:
    """Make every shard of the plan, this rank those that are its own; return all outcomes in shard order."""
    bounds = plan.bounds()
    # What made the bytes: the options, what was left out, and the library that encodes.
    content = json.dumps([plan.key, plan.skipped, PIL.__version__])
    tasks = [
        ShardTask(
            plan.folder / plan.file(shard),
            bounds[shard],
            plan.images[bounds[shard] : bounds[shard + 1]],
            plan.labels[bounds[shard] : bounds[shard + 1]],
            hashlib.sha256(f"{content} {shard}".encode()).hexdigest(),
        )
        for shard in range(group.rank, plan.num_shards, group.size)
    ]
    title = f"prepare {plan.split}" + (" (share of rank 0)" if group.size > 1 else "")
    total = sum(len(task.images) for task in tasks)

    def work() -> list[ShardOutcome]:
        with Progress(title, total, quiet=quiet or group.rank != 0) as progress:
            return run_tasks(make_shard, (source, plan.encoding, decode), tasks, workers, progress)

    shares = on_all(group, work)
    return [shares[shard % group.size][shard // group.size] for shard in range(plan.num_shards)]


def _finish(plan: Plan, outcomes: list[ShardOutcome], say: Echo) -> Manifest:
    entries = [outcome.entry for outcome in outcomes if outcome.entry is not None]
    conversions = _sum(outcome.conversions for outcome in outcomes)
    manifest = Manifest(
        split=plan.split,
        encoding=plan.encoding.name,
        num_records=len(plan.images),
        num_bytes=sum(entry.num_bytes for entry in entries),
        class_names=tuple(plan.class_names),
        shards=tuple(entries),
        image_shape=plan.encoding.image_shape,
        prepare={
            "program": f"hpctrain {__version__}, Pillow {PIL.__version__}",
            "source": plan.source_kind,
            "key": plan.key,
            **plan.options,
            "conversions": conversions,
            "skipped": plan.skipped,
        },
    )
    try:
        manifest.save(plan.folder)
    except OSError as error:
        raise UserError(
            f"cannot write {plan.folder / MANIFEST_NAME}: {error.strerror}; make room and run again"
        ) from error
    (plan.folder / _STATE_NAME).unlink(missing_ok=True)
    converted = sorted(item for outcome in outcomes for item in outcome.converted)
    for what, name in converted[:SHOWN]:
        say(f"re-encoded {name}: {what}")
    named = sum(count for what, count in conversions.items() if any(what == kind for kind, _ in converted))
    if named > SHOWN:
        say(f"... and {named - SHOWN:,} more")
    changed = ", ".join(f"{count:,} {name}" for name, count in conversions.items())
    say(
        f"wrote {plan.folder}: {manifest.num_records:,} records, {manifest.num_bytes / 1e6:,.1f} MB, "
        f"{len(entries)} shards; {manifest.num_records - sum(conversions.values()):,} images kept byte for byte"
        + (f", re-encoded: {changed}" if changed else "")
        + (f"; {len(plan.skipped)} bad images left out" if plan.skipped else "")
    )
    return manifest


def _sum(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        mapping: Mapping[str, int] = one
        for name, count in mapping.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))
