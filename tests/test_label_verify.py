"""Maps are whole and say what the teacher says, or tl-label verify tells."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from colour_teacher import colour_teacher, patchwork
from conftest import random_map
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from tokenlabel.cli import label
from tokenlabel.labeler.fit import place, resize
from tokenlabel.labeler.generate import generate
from tokenlabel.labeler.geometry import PaletteMaps, crop_view, sample_targets
from tokenlabel.labeler.label_map import LabelMap, encode
from tokenlabel.labeler.label_set import LabelSet, tar_name, write_index, write_slice
from tokenlabel.labeler.sources import ImageSource, open_source
from tokenlabel.labeler.verify import (
    LabelledImage,
    bootstrap,
    box_view,
    check_keys,
    crop_agreement,
    measure,
    measure_crops,
    random_crops,
)

SIZES = [(96, 64), (64, 96), (80, 80), (120, 60)]


# ------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("fill", ["residual", "zero"])
def test_agreement_equals_that_of_dense_targets(fill):
    rng = np.random.default_rng(0)
    windows = [(0.0, 0.0, 1.0, 1.0), (0.25, 0.0, 0.75, 1.0), (0.0, 0.1, 1.0, 0.9)]
    maps = PaletteMaps.from_label_maps(
        [random_map(rng, grid=(4 + i, 6), window=window) for i, window in enumerate(windows)]
    )
    views = crop_view(torch.tensor([[0.0, 0.0, 0.6, 0.7], [0.0, 0.2, 1.0, 1.0], [0.2, 0, 0.9, 1]]))
    logits = torch.from_numpy(rng.standard_normal((3, 40, 5, 4)) * 3).float()
    found = crop_agreement(maps, views, logits, fill=fill)
    targets = sample_targets(maps, views, (5, 4), fill=fill)
    weight = targets.token_weight
    assert 0 < weight[1].sum() < 20  # the window leaves some tokens out
    teacher = logits.flatten(2).transpose(1, 2).double().softmax(2)
    target = targets.dense_tokens().double()
    hits = (teacher.argmax(2) == target.argmax(2)) * weight
    divergence = (teacher * (teacher / target).log()).sum(2) * weight
    torch.testing.assert_close(found.token_hits, hits.sum(1), check_dtype=False)
    torch.testing.assert_close(
        found.token_kl, divergence.sum(1), check_dtype=False, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(found.num_tokens, weight.sum(1))
    whole = logits.mean((2, 3)).double().softmax(1)
    view = targets.dense_view().double()
    torch.testing.assert_close(
        found.class_kl,
        (whole * (whole / view).log()).sum(1),
        check_dtype=False,
        rtol=1e-4,
        atol=1e-5,
    )
    assert found.class_hits.tolist() == (whole.argmax(1) == view.argmax(1)).tolist()


def test_a_map_agrees_perfectly_with_the_logits_it_holds():
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.standard_normal((1, 9, 3, 3)) * 4).half().float()
    scores, classes = logits[0].topk(9, dim=0)
    label_map = LabelMap(
        scores=scores.half().numpy(),
        classes=classes.numpy().astype(np.uint32),
        num_classes=9,
        log_normalizer=logits[0].logsumexp(0).half().numpy(),
    )
    view = crop_view(torch.tensor([[1 / 3, 1 / 3, 2 / 3, 2 / 3]]))
    # A crop of the middle cell, read at one token, is bilinear between cells: enlarge first.
    label_map = replace(
        label_map,
        **{
            name: getattr(label_map, name).repeat(4, -1).repeat(4, -2)
            for name in ("scores", "classes", "log_normalizer")
        },
    )
    found = crop_agreement(PaletteMaps.from_label_maps([label_map]), view, logits[:, :, 1:2, 1:2])
    assert found.token_hits.item() == 1
    assert found.token_kl.item() == pytest.approx(0, abs=2e-3)


def labelled(seed: int, size: tuple[int, int], fit: str, *, transpose: bool = False):
    """A patchwork and the map that the colour teacher makes of it."""
    image, teacher = patchwork(seed, size=size), colour_teacher(128)
    placement = place(image.size, fit=fit, teacher_size=128, stride=teacher.stride)
    pixels = torch.from_numpy(resize(image, placement, interpolation="bicubic"))
    logits = teacher.dense(pixels.permute(2, 0, 1)[None])[0]
    logits = logits.transpose(1, 2) if transpose else logits
    scores, classes = logits.topk(5, dim=0)
    label_map = LabelMap(
        scores=scores.half().numpy(),
        classes=classes.numpy().astype(np.uint32),
        num_classes=teacher.num_classes,
        log_normalizer=logits.logsumexp(0).half().numpy(),
        window=placement.window,
    )
    return LabelledImage(f"image {seed}", image, [label_map])


@pytest.mark.parametrize("fit", ["native", "stretch", "center"])
def test_right_maps_agree_on_random_crops_and_transposed_ones_do_not(fit):
    images = [labelled(i, SIZES[i % 4], fit) for i in range(8)]
    table = measure_crops(images, colour_teacher(), num_crops=6)
    assert table.token_top1.low > 0.8
    assert table.grid == (8, 8)
    assert (table.coverage < 0.999) == (fit == "center")
    turned = [labelled(i, SIZES[i % 4], fit, transpose=True) for i in range(8)]
    assert measure_crops(turned, colour_teacher(), num_crops=6).token_top1.high < 0.5


def test_a_map_whose_window_is_forgotten_agrees_less():
    images = [labelled(i, (128, 64), "center") for i in range(6)]
    forgotten = [
        image._replace(maps=[replace(image.maps[0], window=(0.0, 0.0, 1.0, 1.0))])
        for image in images
    ]
    right = measure_crops(images, colour_teacher(), num_crops=6)
    wrong = measure_crops(forgotten, colour_teacher(), num_crops=6)
    assert wrong.token_top1.high < right.token_top1.low


def test_crops_can_be_picked_by_their_area():
    table = measure_crops([labelled(0, (90, 90), "native")], colour_teacher(), num_crops=20)
    small = table[table.area < 0.35]
    assert 0 < len(small.image) < 20
    assert small.area.max() < 0.35
    hits, tokens = small.agreement["token_hits"], small.agreement["num_tokens"]
    assert small.token_top1.value == pytest.approx(hits.sum() / tokens.sum())


def test_classes_of_maps_and_teacher_must_be_as_many():
    rng = np.random.default_rng(0)
    image = LabelledImage("x", patchwork(0, size=(64, 64)), [random_map(rng)])
    with pytest.raises(ValueError, match="40 classes, teacher nearest colour has 12"):
        measure_crops([image], colour_teacher())


# ------------------------------------------------------------------------------- statistics


def test_an_interval_is_that_of_a_mean_over_images():
    image = np.repeat(np.arange(100), 3)
    hits = np.repeat((np.arange(100) % 2).astype(np.float32), 3)  # crops of one image are alike
    interval = bootstrap(hits, np.ones(300, np.float32), image)
    assert interval.value == 0.5
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.05, rel=0.15)


def test_images_with_more_tokens_weigh_more():
    interval = bootstrap(np.array([8.0, 1.0]), np.array([8.0, 2.0]), np.array([0, 1]))
    assert interval.value == 0.9
    assert (interval.low, interval.high) == (0.5, 1.0)


@pytest.mark.parametrize("size", [(100, 100), (320, 120), (90, 250)])
def test_crops_are_drawn_as_torchvision_draws_them(size):
    torch.manual_seed(0)
    image = Image.new("L", size)
    theirs = []
    for _ in range(1500):
        top, left, height, width = RandomResizedCrop.get_params(
            image,  # pyright: ignore[reportArgumentType]: takes PIL images, too
            scale=[0.08, 1.0],
            ratio=[3 / 4, 4 / 3],
        )
        theirs.append((left, top, left + width, top + height))
    ours = np.array(random_crops(size, 1500, seed="x"))
    for boxes in (ours, np.array(theirs)):
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= size).all()

    def moments(boxes):
        sides = (boxes[:, 2:] - boxes[:, :2]) / np.array(size)
        middles = (boxes[:, 2:] + boxes[:, :2]) / 2 / np.array(size)
        return np.concatenate([sides.mean(0), sides.std(0), middles.mean(0), middles.std(0)])

    np.testing.assert_allclose(moments(ours), moments(np.array(theirs)), atol=0.03)


@pytest.mark.parametrize("size", [(900, 60), (50, 700)])
def test_a_panorama_is_cropped_in_its_middle_as_torchvision_does(size):
    # No box of the allowed shapes fits where a side is too short: the fallback is what is compared.
    crops = random_crops(size, 40, seed="x")
    top, left, height, width = RandomResizedCrop.get_params(
        Image.new("L", size),  # pyright: ignore[reportArgumentType]
        scale=[0.999, 1.0],
        ratio=[3 / 4, 4 / 3],
    )
    assert (left, top, left + width, top + height) in crops


def test_crops_depend_on_the_seed_alone():
    assert random_crops((80, 60), 5, seed="0 a") == random_crops((80, 60), 5, seed="0 a")
    assert random_crops((80, 60), 5, seed="0 a") != random_crops((80, 60), 5, seed="0 b")


def test_the_view_of_a_box_is_that_of_its_fractions():
    expected = crop_view(torch.tensor([[0.1, 0.25, 0.6, 0.75]]))
    torch.testing.assert_close(box_view((10, 10, 60, 30), (100, 40)), expected)


# --------------------------------------------------------------------------------- whole sets


@pytest.fixture
def source(tmp_path) -> ImageSource:
    """Twelve patchworks of several shapes in two of twelve classes."""
    root = tmp_path / "photos"
    names = [f"c{i:02}" for i in range(12)]
    for number in range(12):
        path = root / names[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        patchwork(number, size=SIZES[number % 4]).save(path)
    (root / "classes.txt").write_text("\n".join(names))
    return open_source(root)


@pytest.fixture
def labels(source, tmp_path) -> LabelSet:
    """Their label set, by the colour teacher, in slices of five."""
    generate(source, tmp_path / "labels", teacher=colour_teacher(128), shard_size=5)
    return LabelSet.open(tmp_path / "labels")


def test_a_whole_set_is_whole_and_agrees(source, labels):
    assert check_keys(labels.folder, source).is_whole
    found = measure(labels, source, colour_teacher(), num_images=7, num_crops=4)
    assert found.table.token_top1.low > 0.8
    assert (found.num_images, len(found.table.image)) == (7, 28)
    assert found.fill == "residual"
    assert found.same_teacher
    assert not found.unreadable


def test_another_seed_draws_other_images_and_the_same_one_the_same(source, labels):
    first, again, other = (
        measure(labels, source, colour_teacher(), num_images=4, num_crops=2, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first.to_json() == again.to_json()
    assert first.to_json() != other.to_json()


def test_other_weights_are_told_from_those_that_made_the_maps(source, labels):
    other = replace(colour_teacher(), weights_sha256="other")
    assert measure(labels, source, other, num_images=1).same_teacher is False


def test_an_image_that_broke_since_is_counted(source, labels):
    Path(source.samples[0].file).write_bytes(b"no image")
    found = measure(labels, source, colour_teacher(), num_crops=1)
    assert found.num_images == 11
    assert list(found.unreadable) == [source.samples[0].key]


def test_images_of_another_set_are_refused(labels, tmp_path):
    (tmp_path / "others" / "c00").mkdir(parents=True)
    patchwork(0, size=(64, 64)).save(tmp_path / "others" / "c00" / "other.png")
    with pytest.raises(ValueError, match="none of the 12 keys .* is among the 1 images"):
        measure(labels, open_source(tmp_path / "others"), colour_teacher())


@pytest.fixture
def write_set(source, tmp_path) -> Callable[..., Path]:
    """Write a label set of two slices as given."""

    def write(first: list, second: list, *, quarantined: dict[str, str] | None = None) -> Path:
        folder = tmp_path / "written"
        folder.mkdir()
        settings = {"teacher": {"name": "t"}, "fit": "native", "k": 5, "num_classes": 40}
        slices = [
            write_slice(
                folder,
                number,
                maps,
                settings=settings,
                quarantined=(quarantined or {}) if number == 0 else {},
                num_correct=None,
            )
            for number, maps in enumerate((first, second))
        ]
        write_index(folder, slices, settings=settings, class_names=["?"] * 40)
        return folder

    return write


def test_missing_and_surplus_keys_are_listed(source, write_set):
    keys = [sample.key for sample in source.samples]
    data = encode(random_map(np.random.default_rng(0)))
    folder = write_set(
        [(key, data) for key in keys[1:5]],
        [(key, data) for key in [*keys[6:], "zz/surplus"]],
        quarantined={keys[0]: "truncated"},
    )
    found = check_keys(folder, source)
    assert (found.missing, found.surplus) == ([keys[5]], ["zz/surplus"])
    assert (found.num_labelled, found.num_quarantined) == (11, 1)
    assert not found.is_whole


def test_labels_without_an_image_do_no_harm(source, write_set):
    data = encode(random_map(np.random.default_rng(0)))
    keys = [sample.key for sample in source.samples]
    found = check_keys(write_set([(k, data) for k in keys], [("zz/surplus", data)]), source)
    assert found.surplus == ["zz/surplus"]
    assert found.is_whole


def test_keys_that_occur_twice_and_maps_that_cannot_be_read_are_listed(source, write_set):
    keys = [sample.key for sample in source.samples]
    data = encode(random_map(np.random.default_rng(0)))
    flipped = bytes([*data[:-1], data[-1] ^ 1])
    folder = write_set(
        [(key, data) for key in keys], [(keys[3], data), ("zz/odd", b""), ("zz/bad", flipped)]
    )
    found = check_keys(folder, source)
    assert found.duplicates == [keys[3]]
    assert found.undecodable == {
        "zz/odd": "0 bytes are too few for a header of 20",
        "zz/bad": "the checksum does not fit: the bytes are damaged or cut short",
    }
    assert not found.damaged


def test_changed_and_missing_shards_are_listed(source, labels):
    changed = labels.folder / tar_name(0)
    data = bytearray(changed.read_bytes())
    data[700] ^= 1
    changed.write_bytes(data)
    (labels.folder / tar_name(1)).unlink()
    (labels.folder / "labels-00002.json").write_text("{")
    found = check_keys(labels.folder, source)
    assert "checksum" in found.damaged[tar_name(0)]
    assert found.damaged[tar_name(1)] == "missing"
    assert found.damaged["labels-00002.json"] == "missing or damaged"
    assert len(found.undecodable) == 1


# ---------------------------------------------------------------------------------- the command


@pytest.fixture
def timm_set(source, tmp_path) -> list[str]:
    """Arguments of tl-label verify for a set made by a small timm model."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=12)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    images, checkpoint = str(source.root), str(tmp_path / "weights.pth")
    arguments = ["--images", images, "--checkpoint", checkpoint, "--device", "cpu"]
    command = ["generate", *arguments, "--out", str(tmp_path / "labels"), "--image-size", "160"]
    made = CliRunner().invoke(label, [*command, "--teacher", "test_efficientnet"])
    assert made.exit_code == 0, made.output
    return ["verify", str(tmp_path / "labels"), *arguments, "--num-images", "3", "--crops", "2"]


def test_the_command_prints_intervals_and_exits_by_the_threshold(timm_set):
    run = CliRunner().invoke(label, [*timm_set, "--min-agreement", "0"])
    assert run.exit_code == 0, run.output
    assert "12 images labelled, 0 left out" in run.output
    assert "test_efficientnet: the one that made the maps" in run.output
    assert "shown at 128 px (4×4 tokens), fill residual" in run.output  # 0.78 · 160 px
    assert "token top-1  0." in run.output
    strict = CliRunner().invoke(label, [*timm_set, "--min-agreement", "1"])
    assert strict.exit_code == 1
    assert "token top-1 is below --min-agreement 1" in strict.output


def test_the_command_prints_json_and_exits_1_where_a_label_is_missing(timm_set, source):
    patchwork(99, size=(64, 64)).save(Path(source.root) / "c00" / "new.png")
    run = CliRunner().invoke(label, [*timm_set, "--json"])
    assert run.exit_code == 1, run.output
    found = json.loads(run.stdout)
    assert found["keys"]["missing"] == ["c00/new"]
    assert found["agreement"]["same_teacher"] is True
    low, high = (found["agreement"]["token_top1"][name] for name in ("low", "high"))
    assert 0 <= low <= found["agreement"]["token_top1"]["value"] <= high <= 1
