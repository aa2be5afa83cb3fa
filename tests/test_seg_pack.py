"""tl-seg pack: layouts as downloaded, masks that fit, and clear words about those that do not."""

import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from seg_sets import NAMES, paint, png, write_pairs
from shard_sets import make_samples, write_split

from tokenlabel.cli import segment as tl_seg
from tokenlabel.cli import shard as tl_shard
from tokenlabel.segmenter.feed import SegSamples
from tokenlabel.segmenter.pack import MaskSource, open_masks, pack
from tokenlabel.shards.index import read_index
from tokenlabel.shards.masks import BadMask, read_mask, write_mask
from tokenlabel.shards.verify import verify


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_image(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    paint(mask % 4, np.random.default_rng(0)).save(path)


def mask_of(values: list[int]) -> np.ndarray:
    """20 × 24 px in stripes of these values."""
    return np.repeat(np.array(values, dtype=np.uint8), 20 * 24 // len(values)).reshape(20, 24)


def zipped(folder: Path, *, into: str = "") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, into + file.relative_to(folder).as_posix())
    return path


def packed_masks(source: MaskSource, out: Path, split: str = "train") -> dict[str, np.ndarray]:
    pack(source, out, split=split, num_workers=1)
    assert verify(out) == []
    samples = SegSamples(read_index(out), split)
    return {samples.key(i): samples.read(i)[1] for i in range(len(samples))}


@pytest.fixture
def pairs(tmp_path) -> Path:
    return write_pairs(tmp_path / "pairs", 3)


def open_pairs(folder: Path, **options) -> MaskSource:
    return open_masks([str(folder)], split="train", classes=folder / "names.txt", **options)


# ------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_ade20k_is_packed_as_downloaded_and_its_0_is_no_class(tmp_path, form):
    root = tmp_path / "ade" / "ADEChallengeData2016"
    values = [0, 1, 2, 150]
    for split in ("training", "validation"):
        write_image(root / "images" / split / "ADE_1.jpg", mask_of(values))
        write(root / "annotations" / split / "ADE_1.png", png(mask_of(values)))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\n", encoding="utf-8")
    source = zipped(tmp_path / "ade") if form == "zip" else root
    found = open_masks([str(source)], split="train")
    assert found.layout == "ade20k" and len(found.classes.ids) == 150
    masks = packed_masks(found, tmp_path / "out")
    assert masks.keys() == {"ADE_1"}
    assert np.unique(masks["ADE_1"]).tolist() == [0, 1, 149, 255]
    packed_masks(open_masks([str(source)], split="val"), tmp_path / "out", "val")
    assert set(read_index(tmp_path / "out").splits) == {"train", "val"}


def test_cityscapes_comes_in_two_archives_and_its_ids_become_19_classes(tmp_path):
    ids = [0, 7, 33, 9]
    write_image(tmp_path / "a/leftImg8bit/val/bonn/bonn_1_leftImg8bit.png", mask_of(ids))
    write(tmp_path / "b/gtFine/val/bonn/bonn_1_gtFine_labelIds.png", png(mask_of(ids)))
    write(tmp_path / "b/gtFine/val/bonn/bonn_1_gtFine_color.png", png(mask_of([1])))
    archives = [str(zipped(tmp_path / name)) for name in "ab"]
    found = open_masks(archives, split="val")
    masks = packed_masks(found, tmp_path / "out", "val")
    assert masks["bonn/bonn_1"][:, 0].tolist() == [255] * 5 + [0] * 5 + [18] * 5 + [255] * 5
    assert read_index(tmp_path / "out").split("val").repaired == {"PNG, not JPEG": 1}


def test_pascal_voc_has_lists_and_palettes(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for key in ("1", "2", "3"):
        write_image(root / f"JPEGImages/{key}.jpg", mask_of([0]))
    picture = Image.fromarray(mask_of([0, 20, 255, 5]), mode="P")
    picture.putpalette([channel for level in range(256) for channel in (level, 255 - level, 9)])
    (root / "SegmentationClass").mkdir()
    picture.save(root / "SegmentationClass/2.png")
    write(root / "ImageSets/Segmentation/train.txt", b"2\n")
    tar = tmp_path / "voc.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(root.parent, "VOCdevkit")
    masks = packed_masks(open_masks([str(tar)], split="train"), tmp_path / "out")
    assert masks.keys() == {"2"} and np.unique(masks["2"]).tolist() == [0, 5, 20, 255]
    with pytest.raises(ValueError, match=r"no ImageSets/Segmentation/val.txt; it has train"):
        open_masks([str(tar)], split="val")


def test_pairs_may_have_a_folder_for_each_split(pairs, tmp_path):
    for kind in ("images", "masks"):
        (pairs / kind / "train").mkdir()
        for file in sorted((pairs / kind).glob("00[01].*")):
            file.rename(pairs / kind / "train" / file.name)
    assert packed_masks(open_pairs(pairs), tmp_path / "out").keys() == {"000", "001"}


def test_values_are_classes_or_classes_plus_one_or_ignored(pairs):
    plain = open_pairs(pairs).values
    assert plain[[0, 3, 4, 255]].tolist() == [0, 3, -1, 255] and len(plain) == 256
    reduced = open_pairs(pairs, reduce_zero_label=True).values
    assert reduced[[0, 1, 4, 5, 255]].tolist() == [255, 0, 3, -1, 255]
    other = open_pairs(pairs, ignore=[7, 9]).values
    assert other.tolist() == [0, 1, 2, 3, -1, -1, -1, 255, -1, 255]
    with pytest.raises(ValueError, match=r"--ignore 2 is the value of class 2"):
        open_pairs(pairs, ignore=[2])


def test_many_classes_take_16_bits(tmp_path):
    wide = np.arange(400, dtype=np.uint16).reshape(20, 20)
    write_image(tmp_path / "d/images/a.png", wide)
    write(tmp_path / "d/masks/a.png", png(wide))
    names = tmp_path / "d/names.txt"
    names.write_text("\n".join(f"class {i}" for i in range(400)), encoding="utf-8")
    found = open_masks([str(tmp_path / "d")], split="train", classes=names)
    assert found.ignore_index == 65535
    np.testing.assert_array_equal(packed_masks(found, tmp_path / "out")["a"], wide)


def test_what_is_written_as_a_mask_is_read_again():
    for num_classes, values in ((5, [0, 4, 255]), (255, [254, 255]), (256, [0, 255, 65535])):
        mask = np.array([values], dtype=np.int32)
        np.testing.assert_array_equal(read_mask(write_mask(mask, num_classes)), mask)


# ----------------------------------------------------------------------------------- mistakes


def rgb() -> bytes:
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (52, 40)).save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "out of range": (
        png(mask_of([1, 4, 9, 77]).repeat(2, 0)),
        r"pixels of value 4, 9, 77; allowed: 0 to 3, 255",
    ),
    "another size": (png(mask_of([1])), r"has 24 × 20 px .* 52 × 40"),
    "colours": (rgb(), r"is in colours \(RGB\).*one number a pixel"),
    "no PNG": (b"\xff\xd8\xff not", r"is no PNG file"),
    "16 bits": (png(np.full((40, 52), 300, np.uint16)), r"value 300; allowed: 0 to 3, 255"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_mask_stops_the_job_with_its_name_or_is_left_out_on_request(pairs, tmp_path, what):
    data, message = BAD[what]
    (pairs / "masks" / "000.png").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        pack(open_pairs(pairs), tmp_path / "out", split="train", num_workers=1)
    assert str(pairs / "masks" / "000.png") in str(caught.value)
    assert not (tmp_path / "out" / "index.json").exists()
    pack(open_pairs(pairs), tmp_path / "out", split="train", num_workers=1, skip_bad=True)
    entry = read_index(tmp_path / "out").split("train")
    assert entry.num_samples == 2 and entry.num_listed == 3 and list(entry.quarantined) == ["000"]
    assert verify(tmp_path / "out") == []


def test_an_unreadable_image_is_quarantined(pairs, tmp_path):
    (pairs / "images" / "001.jpg").write_bytes(b"")
    pack(open_pairs(pairs), tmp_path / "out", split="train", num_workers=1)
    assert read_index(tmp_path / "out").split("train").quarantined == {
        "001": "the file is empty (0 bytes)"
    }


def test_images_without_masks_and_the_other_way_round_are_refused(pairs):
    (pairs / "masks" / "002.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images of .* have no mask .*: 002"):
        open_pairs(pairs)
    (pairs / "images" / "002.jpg").unlink()
    (pairs / "images" / "001.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 masks of .* have no image .*: 001"):
        open_pairs(pairs)


def test_other_mistakes_are_named(pairs, tmp_path):
    with pytest.raises(ValueError, match="--classes is missing"):
        open_masks([str(pairs)], split="train")
    with pytest.raises(ValueError, match="has none of the known layouts"):
        open_masks([str(pairs / "images")], split="train")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_masks([str(tmp_path / "nothing")], split="train")
    with pytest.raises(FileNotFoundError):
        open_masks([str(tmp_path / "nothing.zip")], split="train")
    ade = tmp_path / "ade"
    for name in ("images/training/1.jpg", "annotations/training/1.png"):
        write(ade / name, b"")
    with pytest.raises(ValueError, match="layout of .* is ade20k.*leave --classes"):
        open_masks([str(ade)], split="train", classes=pairs / "names.txt")
    with pytest.raises(ValueError, match="no split 'test'"):
        open_masks([str(ade)], split="test")


# -------------------------------------------------------------------------------- the shards


def test_verify_sees_classes_out_of_range_in_a_packed_mask(pairs, tmp_path):
    source = open_pairs(pairs)
    pack(source, tmp_path / "out", split="train", num_workers=1)
    index = read_index(tmp_path / "out")
    entry = index.split("train")
    damaged = replace(entry, masks={"ignore_index": 254})
    from tokenlabel.shards.index import write_index

    write_index(replace(index, splits={"train": damaged}))
    assert "has pixels of value 255; allowed: 0 to 3, and 254" in str(verify(tmp_path / "out")[0])


def test_the_index_of_a_data_set_without_masks_has_no_word_of_them(tmp_path):
    write_split(tmp_path, make_samples(["a", "b"]))
    assert "masks" not in (tmp_path / "index.json").read_text(encoding="utf-8")
    assert verify(tmp_path) == []
    with pytest.raises(ValueError, match="has no masks"):
        SegSamples(read_index(tmp_path), "train")


def test_the_command_packs_and_says_what(pairs, tmp_path):
    common = ["--source", str(pairs), "--out", str(tmp_path / "out"), "--split", "train"]
    done = CliRunner().invoke(tl_seg, ["pack", *common, "--classes", str(pairs / "names.txt")])
    assert done.exit_code == 0, done.output
    assert "3 samples in 1 shard" in done.output and "layout pairs, 4 classes" in done.output
    shown = CliRunner().invoke(tl_shard, ["info", str(tmp_path / "out")])
    assert "masks, 255 for pixels without a class" in shown.output
    as_json = CliRunner().invoke(tl_shard, ["info", str(tmp_path / "out"), "--json"])
    assert json.loads(as_json.output)["splits"]["train"]["masks"]["layout"] == "pairs"
    again = CliRunner().invoke(tl_seg, ["pack", *common])
    assert again.exit_code == 2 and "--classes is missing" in again.output
    assert read_index(tmp_path / "out").class_names == NAMES


def test_a_mask_that_is_cut_short_is_bad():
    whole = png(np.random.default_rng(0).integers(0, 4, (40, 40), dtype=np.uint8))
    with pytest.raises(BadMask, match="is damaged"):
        read_mask(whole[: len(whole) // 2])
