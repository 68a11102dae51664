"""Tars as input: the shards are those of class folders, and whatever is wrong with a tar is named with its place."""

import gzip
import io
import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data import ShardReader
from hpctrain.data.prepare.sources import open_source
from hpctrain.data.prepare.sources.files import PlacedFile
from hpctrain.data.prepare.sources.tar_members import tar_members
from hpctrain.errors import UserError
from tests.data.source_inputs import WNIDS, class_folders, make_tar, run, shard_bytes, tar_of_tars, train_images

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def flat(prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{wnid}/{name}": blob for wnid, files in train_images().items() for name, blob in files.items()}


def shuffled_members(members: dict[str, bytes]) -> dict[str, bytes]:
    names = list(members)
    random.Random(5).shuffle(names)
    return {name: members[name] for name in names}


def test_same_shards_from_folders_and_every_kind_of_tar(tmp_path: Path) -> None:
    images = train_images()
    run(class_folders(tmp_path / "tree", images), tmp_path / "expected", "train", shards=3, seed=4)
    expected = shard_bytes(tmp_path / "expected" / "train")
    class_tars = tmp_path / "class_tars"
    class_tars.mkdir()
    for wnid, files in images.items():
        (class_tars / f"{wnid}.tar").write_bytes(make_tar(files))
    inputs = {
        "ILSVRC2012_img_train.tar": tar_of_tars(images),
        "backwards.tar": tar_of_tars({wnid: shuffled_members(images[wnid]) for wnid in reversed(WNIDS)}),
        "with_folder.tar": make_tar(
            {f"x/{w}.tar": make_tar({f"./{w}/{n}": b for n, b in images[w].items()}) for w in WNIDS}
        ),
        "plain.tar": make_tar(shuffled_members(flat()), tarfile.GNU_FORMAT),
        "dotted.tar": make_tar(flat("./"), tarfile.PAX_FORMAT),
        "deep.tar": make_tar(flat("imagenet/train/")),
        "noise.tar": make_tar({**flat("a/"), "a/README.txt": b"text", "a/n01440764/._n01440764_100.JPEG": b"mac"}),
    }
    for name, content in inputs.items():
        (tmp_path / name).write_bytes(content)
    for place in [class_tars, *(tmp_path / name for name in inputs)]:
        out = tmp_path / "out" / place.name
        manifest = run(place, out, "train", shards=3, seed=4)
        assert shard_bytes(out / "train") == expected, place
        assert manifest.class_names == WNIDS
    reader = ShardReader(tmp_path / "out" / "plain.tar" / "train")
    blobs = reader.read(np.arange(reader.num_records))
    assert blobs == [images[name.split("/")[0]][name.split("/")[1]] for name in map(reader.name, range(len(blobs)))]


def test_tar_program_makes_what_is_read(tmp_path: Path) -> None:
    tar = shutil.which("tar")
    if tar is None:
        pytest.skip("there is no tar program")
    images = train_images()
    tree = class_folders(tmp_path / "tree", images)
    listing = open_source(tree, "train").list_images()
    for options in ([], ["--format=posix"], ["--format=v7"], ["--format=ustar", "--blocking-factor=1"]):
        for wnid in WNIDS:
            subprocess.run([tar, "-cf", tmp_path / f"{wnid}.tar", *options, "-C", tree / wnid, "."], check=True)
        names = [f"{wnid}.tar" for wnid in WNIDS]
        subprocess.run([tar, "-cf", tmp_path / "whole", *options, "-C", tmp_path, *names], check=True)
        subprocess.run([tar, "-cf", tmp_path / "plain", *options, "-C", tmp_path, "tree"], check=True)
        for name in ("whole", "plain"):
            source = open_source(tmp_path / name, "train")
            found = source.list_images()
            assert [image.name for image in found.images.sorted()] == [image.name for image in listing.images.sorted()]
            for image in found.images:
                assert source.read(image) == images[image.class_name][image.path]


member_names = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=90), min_size=1, max_size=5
).map("/".join)


@settings(max_examples=60)
@given(
    st.dictionaries(member_names, st.binary(max_size=1500), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.integers(0, 3),
)
def test_members_are_where_tarfile_finds_them(
    tmp_path_factory: pytest.TempPathFactory, members, format, before
) -> None:
    content = make_tar(members, format)
    path = tmp_path_factory.getbasetemp() / "members.tar"
    path.write_bytes(b"?" * 512 * before + content + b"?" * 100)
    with PlacedFile(path) as file:
        start = 512 * before
        found = [(m.name, m.offset - start, m.num_bytes) for m in tar_members(file, start, start + len(content))]
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert found == [(m.name, m.offset_data, m.size) for m in archive if not m.name.endswith("/")]


def test_ustar_names_in_two_fields(tmp_path: Path) -> None:
    names = ["a" * 90 + "/" + "b" * 90, "c" * 100, "d/" * 60 + "e.jpg"]
    path = tmp_path / "t.tar"
    path.write_bytes(make_tar(dict.fromkeys(names, b"x"), tarfile.USTAR_FORMAT))
    with PlacedFile(path) as file:
        assert [member.name for member in tar_members(file)] == names


def test_listing_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = {wnid: {f"{wnid}_{i}.JPEG": os.urandom(200_000) for i in range(5)} for wnid in WNIDS}
    (tmp_path / "t.tar").write_bytes(tar_of_tars(big))
    read: list[int] = []
    original = PlacedFile.read

    def counted(self: PlacedFile, offset: int, num_bytes: int) -> bytes:
        read.append(num_bytes)
        return original(self, offset, num_bytes)

    monkeypatch.setattr(PlacedFile, "read", counted)
    assert len(open_source(tmp_path / "t.tar", "train").list_images().images) == 20
    assert sum(read) < 40_000 and max(read) <= 512


def test_a_tar_cut_off_anywhere_is_never_taken_for_a_shorter_one(tmp_path: Path) -> None:
    images = {wnid: dict(list(files.items())[:2]) for wnid, files in train_images(classes=2).items()}
    content = tar_of_tars(images)
    whole = tmp_path / "whole.tar"
    whole.write_bytes(content)
    with PlacedFile(whole) as file:
        end = max(member.offset + member.num_bytes for member in tar_members(file))
    path = tmp_path / "cut.tar"
    for length in [*range(512, end + 1, 257), end]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.tar is (cut off|damaged).* byte \d+"):
            open_source(path, "train").list_images()
    path.write_bytes(content[: end - 1200])
    with pytest.raises(
        UserError, match=rf"cut off inside n\d+\.tar, which should reach .* but ends at byte {end - 1200}"
    ):
        open_source(path, "train").list_images()
    inner = make_tar(images[WNIDS[0]])
    path.write_bytes(make_tar({f"{WNIDS[0]}.tar": inner[:1200]}))
    with pytest.raises(UserError, match=r"n01440764\.tar in .*cut\.tar is cut off inside n01440764_100\.JPEG"):
        open_source(path, "train").list_images()


def test_a_tar_that_shrinks_after_it_was_listed(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(make_tar(flat()))
    source = open_source(path, "train")
    last = max(source.list_images().images, key=lambda image: image.offset)
    path.write_bytes(path.read_bytes()[: last.offset + 10])
    with pytest.raises(UserError, match=rf"t\.tar has become shorter: {last.name} .* byte {last.offset}"):
        source.read(last)


def test_damaged_header_is_named_with_its_place(tmp_path: Path) -> None:
    content = bytearray(make_tar(flat()))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        third = archive.getmembers()[2]
    content[third.offset + 20] ^= 4
    path = tmp_path / "t.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"t\.tar is damaged at byte {third.offset}, after n01440764/n01440764_107"):
        open_source(path, "train").list_images()


def test_sizes_and_places_beyond_eight_gigabytes(make_image: Callable[..., bytes], tmp_path: Path) -> None:
    large = tarfile.TarInfo("large.bin")
    large.size = 150 << 30
    path = tmp_path / "t.tar"
    with open(path, "wb") as file:
        file.write(large.tobuf(tarfile.GNU_FORMAT))
        file.seek(large.size, io.SEEK_CUR)  # sparse on disk
        file.write(tar_of_tars({"n01440764": {"a.JPEG": make_image(1)}}))
    source = open_source(path, "train")
    (found,) = source.list_images().images
    assert found.offset > large.size and source.read(found) == make_image(1)


def test_odd_members_are_stepped_over(make_image: Callable[..., bytes], tmp_path: Path) -> None:
    blob = make_image(1)
    folder = tarfile.TarInfo("n01440764")
    folder.type, folder.size = tarfile.DIRTYPE, 4096  # some programs state a size, and write no content
    dot = tarfile.TarInfo(".")
    image = make_tar({"n01440764/a.JPEG": blob, "n01440764/.hidden/b.JPEG": b"x", "n01440764": b"x"})
    content = folder.tobuf(tarfile.USTAR_FORMAT) + dot.tobuf(tarfile.USTAR_FORMAT) + image
    (tmp_path / "n01440764.tar").write_bytes(content)
    for place in (tmp_path, tmp_path / "n01440764.tar"):
        source = open_source(place, "train")
        (found,) = source.list_images().images
        assert found.name == "n01440764/a.JPEG" and source.read(found) == blob


def _with_link(path: Path, kind: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("n01440764/a.jpg")
        info.type, info.linkname = kind, "b.jpg"
        archive.addfile(info)


def test_what_cannot_be_read_is_refused_in_words(tmp_path: Path) -> None:
    def path(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    whole = make_tar(flat())
    links = tmp_path / "links.tar"
    _with_link(links, tarfile.SYMTYPE)
    hard = tmp_path / "hard.tar"
    _with_link(hard, tarfile.LNKTYPE)
    folder = tmp_path / "downloads"
    folder.mkdir()
    shutil.copy(path("t.tar", whole), folder / "ILSVRC2012_img_train.tar")
    mixed = class_folders(tmp_path / "mixed", train_images())
    (mixed / f"{WNIDS[0]}.tar").write_bytes(whole)
    twice = list(flat().items())
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "n01440764.tar.gz").write_bytes(gzip.compress(whole))
    cases: list[tuple[Path, str]] = [
        (packed, r"holds n01440764\.tar\.gz, which is compressed.*gunzip"),
        (path("t.tar.gz", gzip.compress(whole)), r"t\.tar\.gz is compressed.*gunzip t\.tar\.gz"),
        (path("t.tar.xz", b"\xfd7zXZ\0rest"), "unxz"),
        (path("x.bin", b"some other file" * 50), "neither a tar nor a TFRecord file; expected a folder"),
        (path("empty", b""), "neither a tar nor a TFRecord"),
        (path("zeros", bytes(10240)), "neither a tar nor a TFRecord"),
        (path("texts.tar", make_tar({"a/b.txt": b"text"})), "no images in .*texts.tar; expected files ending in .jpg"),
        (path("flat.tar", make_tar({"a.JPEG": b"x"})), r"a\.JPEG in no folder.*--labels.*devkit"),
        (path("splits.tar", make_tar({**flat("train/"), **flat("val/")})), "holds train and val rather than"),
        (path("split_tars.tar", make_tar({"train.tar": whole, "val.tar": whole})), "tars of train and val rather than"),
        (path("both.tar", make_tar({"a.tar": whole, "b/c.jpg": b"x"})), r"holds a tar, a\.tar, but an image, b/c\.jpg"),
        (path("nested.tar", make_tar({"a.tar": make_tar({"b.tar": whole})})), r"the tar of a holds a tar, b\.tar"),
        (path("twice.tar", make_tar([*twice, twice[3]])), rf"holds {twice[3][0]} twice"),
        (links, "holds n01440764/a.jpg as a link.*--dereference"),
        (hard, "holds n01440764/a.jpg as a link.*--hard-dereference"),
        (folder, r"holds ILSVRC2012_img_train\.tar; give one of them"),
        (mixed, r"both class folders \(n01440764\) and class tars \(n01440764\.tar\)"),
        (
            path("inner.tar", make_tar({"n01440764.tar": gzip.compress(whole)})),
            "n01440764.tar in .* is (damaged|cut off)",
        ),
    ]
    for place, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            run(place, tmp_path / "out", "train")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="classes hold no images, the first is 'n02119789'"):
        run(path("gap.tar", tar_of_tars({**train_images(), WNIDS[3]: {}})), tmp_path / "out", "train")


@settings(max_examples=150)
@given(st.data())
def test_damage_gives_a_sentence_or_the_same_listing_or_another(tmp_path_factory, data) -> None:
    """Any bytes may be wrong: no other exception than a UserError, and no endless loop."""
    content = bytearray(make_tar(list(flat().items())[:3], data.draw(st.sampled_from(list(FORMATS.values())))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    path.write_bytes(content)
    try:
        source = open_source(path, "train")
        for image in source.list_images().images:
            assert len(source.read(image)) == image.num_bytes
    except UserError as error:
        assert "\n" not in str(error)


def test_workers_make_the_same_from_a_tar(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(tar_of_tars(train_images()))
    run(tmp_path / "t.tar", tmp_path / "one", "train", shards=4, resize=16)
    run(tmp_path / "t.tar", tmp_path / "two", "train", shards=4, resize=16, workers=2)
    assert shard_bytes(tmp_path / "one" / "train") == shard_bytes(tmp_path / "two" / "train")


def test_unfinished_work_from_a_tar_goes_on_from_the_folders(tmp_path: Path) -> None:
    """The same images are the same shards, so what was begun with one kind of input can be finished with another."""
    images = train_images()
    (tmp_path / "t.tar").write_bytes(tar_of_tars(images))
    out = tmp_path / "out"
    run(tmp_path / "t.tar", out, "train", shards=4)
    (out / "train" / "dataset.json").unlink()
    (out / "train" / "train-00002-of-00004.h5").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (out / "train").glob("*.h5")}
    run(class_folders(tmp_path / "tree", images), out, "train", shards=4)
    after = {path.name: path.stat().st_mtime_ns for path in (out / "train").glob("*.h5")}
    assert len(after) == 4 and all(after[name] == time for name, time in before.items())


def test_oddities_in_a_tar_are_handled_and_named(make_image: Callable[..., bytes], tmp_path: Path) -> None:
    plain = make_image(3)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0"  # says it has five entries and ends
    truncated_exif = plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:]
    images = train_images()
    images[WNIDS[1]]["n01443537_1.JPEG"] = make_image(1, mode="CMYK")
    images[WNIDS[2]]["n01484850_2.JPEG"] = make_image(2, format="PNG")
    images[WNIDS[3]]["n02119789_3.JPEG"] = truncated_exif
    (tmp_path / "t.tar").write_bytes(tar_of_tars(images))
    named = ["re-encoded n01443537/n01443537_1.JPEG: CMYK JPEG", "re-encoded n01484850/n01484850_2.JPEG: PNG"]
    for attempt in ("first", "resumed"):
        lines: list[str] = []
        manifest = run(tmp_path / "t.tar", tmp_path / "out", "train", shards=4, quiet=False, echo=lines.append)
        assert manifest.prepare["conversions"] == {"CMYK JPEG": 1, "PNG": 1}, attempt
        assert [line for line in lines if line.startswith("re-encoded")] == named, attempt
        (tmp_path / "out" / "train" / "dataset.json").unlink()
    manifest.save(tmp_path / "out" / "train")
    reader = ShardReader(tmp_path / "out" / "train")
    record = next(i for i in range(reader.num_records) if reader.name(i).endswith("n02119789_3.JPEG"))
    assert reader.read([record])[0] == truncated_exif  # every decoder skips it: kept as it came


def test_many_oddities_are_counted_beyond_the_first(make_image: Callable[..., bytes], tmp_path: Path) -> None:
    pngs = {f"a/{i:03d}.png": make_image(i, format="PNG") for i in range(50)}
    (tmp_path / "t.tar").write_bytes(make_tar(pngs))
    lines: list[str] = []
    run(tmp_path / "t.tar", tmp_path / "out", "train", shards=2, quiet=False, echo=lines.append)
    named = [line for line in lines if line.startswith("re-encoded")]
    assert len(named) == 20 and named == sorted(named) and "... and 30 more" in lines
