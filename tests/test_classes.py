"""Other classes than the teacher's: files that name them, sums of probabilities, clear errors."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from tokenlabel.cli import label
from tokenlabel.labeler import teacher as teacher_module
from tokenlabel.labeler.classes import (
    ClassList,
    LabelSpace,
    Reduction,
    check_classes,
    choose_classes,
    read_class_map,
    read_kept,
    space_of_set,
)
from tokenlabel.labeler.generate import generate as generate_maps
from tokenlabel.labeler.label_map import decode
from tokenlabel.labeler.label_set import LabelSet
from tokenlabel.labeler.sources import ImageSource, open_source
from tokenlabel.labeler.teacher import Teacher, as_teacher, load_teacher

CPU = torch.device("cpu")
IDS = ["pug", "beagle", "robin", "owl", "wren", "car"]
NAMES = ["pug, pug-dog", "Beagle", "robin, bird", "owl", "wren, bird", "car, automobile"]
PETS = ClassList("pets", 6, IDS, NAMES)


@pytest.fixture(scope="module")
def imagenet() -> ClassList:
    info = ImageNetInfo()
    names = [info.index_to_description(i) for i in range(1000)]
    return ClassList("a_model", 1000, info.label_names(), names)


def images_of(*folders: str, ids: list[str] | None = None) -> ImageSource:
    """A source that is asked for nothing but its classes."""
    ids = list(folders) if ids is None else ids
    return ImageSource("photos", [], ids, list(folders))


def written(folder: Path, *lines: str, name: str = "file.csv") -> Path:
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------- what is meant?


@pytest.mark.parametrize(
    "text", ["n02099601", "207", "golden retriever", "Golden_Retriever", " golden  retriever"]
)
def test_a_class_is_found_by_wnid_index_or_name(imagenet, text):
    assert imagenet.find(text) == 207


def test_one_of_several_names_will_do(imagenet):
    assert imagenet.find("Carassius auratus") == imagenet.find("goldfish") == 1
    assert imagenet.find("missile") == 657  # although 744 is "projectile, missile"


def test_ids_that_are_numbers_come_before_indices():
    digits = ClassList("digits", 3, ["2", "0", "1"], ["two", "nought", "one"])
    assert [digits.find(text) for text in ("0", "1", "2", "nought")] == [1, 2, 0, 1]


def test_several_classes_are_meant_by_first_and_last(imagenet):
    assert imagenet.find_all("151..268") == range(151, 269)
    assert imagenet.find_all("n02085620 .. Mexican hairless") == range(151, 269)
    assert imagenet.find_all("pug") == range(254, 255)
    with pytest.raises(ValueError, match=r"'9\.\.7' is no range: class 7 comes before class 9"):
        imagenet.find_all("9..7")


def test_unknown_and_ambiguous_classes_are_refused_with_what_could_be_meant(imagenet):
    with pytest.raises(ValueError, match=r"no class 'goldfisch'; did you mean goldfish \(n0144"):
        imagenet.find("goldfisch")
    with pytest.raises(ValueError, match=r"no class '1000'; its classes are 0 to 999"):
        imagenet.find("1000")
    with pytest.raises(ValueError, match=r"'crane' is the name of 2 classes: 134 \(.*517 \(crane"):
        imagenet.find("crane")
    with pytest.raises(ValueError, match="no class 'dog'; its classes are 0 to 2$"):
        ClassList("a_model", 3).find("dog")


# ---------------------------------------------------------------------------- --keep-classes FILE


def test_classes_are_kept_in_the_order_of_the_file(tmp_path):
    path = written(tmp_path, "# birds first", "owl", "", "2  # robin", "pug..beagle\tdogs")
    space = read_kept(path, PETS)
    assert list(space.members) == [[3], [2], [0], [1]]
    assert space.names == ["owl", "robin, bird", "dogs", "dogs"]
    assert space.ids == ["owl", "robin", "pug", "beagle"]


def test_a_file_of_windows_is_read(tmp_path):
    path = tmp_path / "keep.txt"
    path.write_bytes("\ufeffowl\r\nwren\r\n".encode())
    assert list(read_kept(path, PETS).members) == [[3], [4]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["owl", "wrenn"], r"file.csv, line 2: pets has no class 'wrenn'; did you mean wren\?"),
        (["owl", "pug", "3"], "line 3: class owl of the teacher is named already in .*line 1"),
        (["owl"], "file.csv leaves 1 classes to choose from; name two or more"),
        (["# nothing"], "file.csv leaves 0 classes"),
        (["owl\tan owl\tmore"], "line 1: 3 columns instead of 2"),
    ],
)
def test_mistakes_in_a_list_of_classes_are_named_with_their_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_kept(written(tmp_path, *lines), PETS)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "keep.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="keep.txt is not UTF-8 text"):
        read_kept(tmp_path / "keep.txt", PETS)


def test_the_folders_can_say_what_is_kept():
    images = images_of("a wren", "car", ids=["wren", "car"])
    space = choose_classes(PETS, images, keep_classes="folders")
    assert space is not None and list(space.members) == [[4], [5]]
    assert space.names == ["a wren", "car, automobile"]
    with pytest.raises(ValueError, match="folders, class 1 of photos: pets has no class 'sofa'"):
        choose_classes(PETS, images_of("wren", "sofa"), keep_classes="folders")


# ------------------------------------------------------------------------------- --class-map FILE

ANIMALS = ClassList("photos", 4, ["birds", "cats", "dogs", "other"], ["b", "c", "d", "o"])


@pytest.mark.parametrize(
    "lines",
    [
        ["pug,dogs", "beagle,d", "*,other", "robin,0", "owl,birds", "wren,birds"],
        ["*\tother", '"pug, pug-dog"\tdogs', "beagle\tdogs", "robin..wren\tbirds # all of them"],
        ['"pug, pug-dog", dogs', "beagle, dogs", "robin .. wren, birds", "5, other"],
    ],
)
def test_a_map_adds_the_teachers_classes_up_to_the_folders(tmp_path, lines, caplog):
    space = read_class_map(written(tmp_path, *lines), PETS, ANIMALS)
    assert list(space.members) == [[2, 3, 4], [], [0, 1], [5]]
    assert (space.ids, space.names) == (ANIMALS.ids, ANIMALS.names)
    assert "1 of 4 classes have no teacher class and can never be a label: c (cats)" in caplog.text


def test_what_a_map_uses_and_drops_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    read_class_map(written(tmp_path, "pug,dogs", "owl,birds"), PETS, ANIMALS)
    assert "2 of the teacher's 6 classes make up 2 classes, 4 are dropped" in caplog.text


def test_images_without_classes_get_those_of_the_map(tmp_path):
    space = read_class_map(
        written(tmp_path, "owl,bird", "pug,dog", "wren,bird"), PETS, ClassList("p", 0)
    )
    assert (list(space.members), space.names) == ([[3, 4], [0]], ["bird", "dog"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["pug,dogs", "teapot,other"], "line 2: pets has no class 'teapot'"),
        (["pug,dogs", "owl,bird"], "line 2: photos has no class 'bird'; did you mean b .birds.?"),
        (["pug,dogs", "pug,other"], "line 2: class pug of the teacher is named already.*line 1"),
        (["pug,dogs", "owl"], "line 2: 'owl' has no second column; expected TEACHER CLASS,CLASS"),
        (["pug, pug-dog, dogs"], 'line 1: 3 columns instead of 2; .*between double quotes, "like'),
        (["pug,dogs", "0..5,other"], "line 2: class pug of the teacher is named already"),
        (["0..5,other", "*,dogs"], r"line 2: no class of the teacher is left for \*"),
        (["0..5,other"], "leaves 1 classes to choose from"),
    ],
)
def test_mistakes_in_a_class_map_are_named_with_their_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_class_map(written(tmp_path, *lines), PETS, ANIMALS)


# ------------------------------------------------------------------------------------- the logits


def slow_reduction(logits: np.ndarray, members: list[list[int]]) -> np.ndarray:
    """Log-probabilities in float64, cell by cell, given that it is one of these classes."""
    result = np.empty((len(logits), len(members)))
    for row, cell in enumerate(logits.astype(np.float64)):
        weights = [math.fsum(math.exp(cell[i]) for i in own) for own in members]
        total = math.fsum(weights)
        result[row] = [math.log(w / total) if w else -math.inf for w in weights]
    return result


def log_probabilities(logits: torch.Tensor) -> np.ndarray:
    return logits.double().log_softmax(-1).numpy()


MAPPED = [[4, 0, 7], [], [2], [11, 3], [5, 6, 8, 9, 10, 1]]


def space_of(members: list[list[int]], num: int) -> LabelSpace:
    return LabelSpace(kind="mapped", members=members, num_teacher_classes=num)


@pytest.mark.parametrize("spread", [0.1, 5, 60])
def test_a_map_of_twelve_classes_to_five_equals_the_slow_reference(spread):
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * spread
    found = log_probabilities(Reduction(space_of(MAPPED, 12), CPU)(logits))
    wanted = slow_reduction(logits.numpy(), MAPPED)
    reached = [0, 2, 3, 4]
    assert np.allclose(found[:, reached], wanted[:, reached], atol=1e-5, rtol=1e-6)
    assert (found[:, 1] < found[:, reached].min(1) - 19).all()
    assert np.isfinite(found).all()


def test_adding_up_probabilities_does_not_depend_on_the_level_of_logits():
    logits = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    reduction = Reduction(space_of(MAPPED, 12), CPU)
    shifted = reduction(logits + 300)
    assert torch.isfinite(shifted).all()
    assert torch.allclose(shifted, reduction(logits) + 300, atol=1e-3)


def test_kept_logits_are_the_teachers_own_to_the_last_bit():
    logits = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    for members in ([[7], [2], [11]], [[7], [2], []]):
        found = Reduction(space_of(members, 12), CPU)(logits)
        assert torch.equal(found[:, :2], logits[:, [7, 2]])


@pytest.mark.gpu
def test_a_gpu_adds_up_what_the_cpu_adds_up():
    logits = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) * 5
    space = space_of(MAPPED, 12)
    on_gpu = logits.cuda()
    reduction = Reduction(space, on_gpu.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = reduction(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(found.cpu(), Reduction(space, CPU)(logits), atol=1e-5)


def small_teacher(**config) -> Teacher:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=12, pretrained_cfg_overlay=config)
    with torch.no_grad():  # random heads are all but indifferent
        model.get_parameter("fc.weight").mul_(100)
    return as_teacher(model, name="small", image_size=64, device=CPU)


def test_a_teachers_dense_logits_are_reduced_in_pieces_of_any_size(monkeypatch):
    teacher = small_teacher()
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    full = teacher.dense(images).permute(0, 2, 3, 1).reshape(-1, 12)
    reduced = teacher.in_space(space_of(MAPPED, 12))
    found = reduced.dense(images)
    assert found.shape == (2, 5, 2, 3) and reduced.num_classes == 5
    cells = found.permute(0, 2, 3, 1).reshape(-1, 5)
    wanted = slow_reduction(full.numpy(), MAPPED)
    assert np.allclose(
        log_probabilities(cells)[:, [0, 2, 3, 4]], wanted[:, [0, 2, 3, 4]], atol=1e-4
    )
    monkeypatch.setattr(teacher_module, "_MAX_LOGITS", 30)
    assert torch.allclose(reduced.dense(images), found, atol=1e-4)


def test_a_teacher_is_left_as_it_is_where_nothing_is_chosen():
    teacher = small_teacher()
    assert teacher.in_space(None) is teacher
    space = choose_classes(teacher.classes, images_of("a", "b"), keep_classes="all")
    kept = teacher.in_space(space)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kept.dense(images), teacher.dense(images))
    assert space is not None and space.to_settings() == {}


# ------------------------------------------------------------------- do images and teacher agree?


def test_other_numbers_of_classes_are_an_error_that_names_the_choices():
    with pytest.raises(ValueError, match="photos has 2 classes, pets has 6") as caught:
        check_classes(images_of("a", "b"), PETS, None)
    text = str(caught.value)
    for choice in (
        "--class-map FILE",
        "--keep-classes FILE",
        "--keep-classes all",
        "tl-train run --recipe class_labels",
        "--set model.name=convnext_tiny --set model.pretrained=true",
        "tl-label generate --teacher convnext_tiny --checkpoint run/checkpoints/best.pt",
    ):
        assert choice in text


def test_chosen_classes_of_another_number_are_a_warning(caplog, tmp_path):
    space = read_kept(written(tmp_path, "owl", "wren", "car"), PETS)
    check_classes(images_of("a", "b"), ClassList("pets", 3, space.ids, space.names), space)
    assert "the maps speak of 3 classes, photos has 2" in caplog.text


def test_images_without_classes_and_classes_without_names_fit_any_teacher(caplog):
    check_classes(images_of(), PETS, None)
    check_classes(images_of("a", "b", "c"), ClassList("teacher", 3), None)
    check_classes(images_of("0", "1", "2", "3", "4", "5"), PETS, None)
    check_classes(images_of(*NAMES, ids=IDS), PETS, None)
    check_classes(images_of("Pug-Dog", "Beagle", "Robin", "OWL", "wren", "automobile"), PETS, None)
    assert not caplog.text


def test_as_many_classes_with_other_names_are_a_warning(caplog):
    check_classes(images_of("sofa", "lamp", "desk", "owl", "rug", "jug"), PETS, None)
    assert (
        "6 classes each, but 5 of them have other names, e.g. class 0 is sofa there" in caplog.text
    )


def test_the_same_classes_in_another_order_are_refused():
    ids = [*IDS[:4], IDS[5], IDS[4]]
    with pytest.raises(ValueError, match="another order: class 4 is 'car' there and 'wren' here"):
        check_classes(images_of(*ids), PETS, None)


# ------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Four small photos in two classes, and the file of a teacher of twelve."""
    root = tmp_path_factory.mktemp("own")
    for number in range(4):
        folder = root / "photos" / ("bird" if number < 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48)).save(folder / f"{number}.png")
    torch.save(small_teacher().model.state_dict(), root / "teacher.pth")
    return root


def run_label(photos: Path, command: str, *words: str | Path) -> Result:
    arguments = [
        *(command, "--images", photos / "photos", "--teacher", "test_resnet"),
        *("--checkpoint", photos / "teacher.pth", *words),
    ]
    return CliRunner().invoke(label, [str(word) for word in arguments])


def generate(photos: Path, out: Path, *words: str | Path) -> Result:
    return run_label(photos, "generate", "--out", out, "--image-size", "64", *words)


def test_generate_with_a_class_map_labels_with_the_folders_classes(photos, tmp_path):
    members = [[0, 1, 2, 7], [4, 5, 9]]
    lines = ["0..2,bird", "7,bird", "4,dog", "5,dog", "9,dog"]
    out = tmp_path / "labels"
    result = generate(photos, out, "--class-map", written(tmp_path, *lines))
    assert result.exit_code == 0, result.output
    assert "teacher top-1" in result.output
    labels = LabelSet.open(out)
    assert (labels.k, labels.num_classes, labels.class_names) == (2, 2, ["bird", "dog"])
    assert labels.index["teacher"]["class_members"] == members
    teacher = load_teacher(
        "test_resnet", checkpoint=photos / "teacher.pth", image_size=64, device="cpu"
    )
    rest = generate(photos, tmp_path / "full", "--keep-classes", "all", "--top-k", "12")
    assert rest.exit_code == 0, rest.output
    full = LabelSet.open(tmp_path / "full")
    for key in labels.keys:
        (found,), (whole,) = decode(labels.read(key)), decode(full.read(key))
        assert whole.num_classes == teacher.num_classes and found.log_normalizer is not None
        logits = np.empty(whole.scores.shape)
        np.put_along_axis(logits, whole.classes.astype(int), whole.scores.astype(float), 0)
        wanted = slow_reduction(logits.reshape(12, -1).T, members)
        best = wanted.T.reshape(2, *found.grid).argmax(0)
        log_p = found.scores.astype(float) - found.log_normalizer.astype(float)
        assert (found.classes[0] == best).mean() > 0.9  # the full map is rounded to float16
        assert np.allclose(log_p[0], wanted.max(1).reshape(found.grid), atol=0.05)


def test_verify_reads_the_classes_off_the_set(photos, tmp_path):
    out = tmp_path / "labels"
    assert generate(photos, out, "--keep-classes", written(tmp_path, "3", "1", "8")).exit_code == 0
    checked = CliRunner().invoke(
        label,
        f"verify {out} --images {photos / 'photos'} --checkpoint {photos / 'teacher.pth'} "
        "--crops 2 --json",
    )
    assert checked.exit_code == 0, checked.output
    start = checked.output.index("{")
    assert json.loads(checked.output[start:])["agreement"]["token_kl"]["value"] < 1.2


def test_sets_with_other_classes_do_not_mix(photos, tmp_path):
    out = tmp_path / "labels"
    assert generate(photos, out, "--keep-classes", written(tmp_path, "3", "1")).exit_code == 0
    other = generate(photos, out, "--keep-classes", written(tmp_path, "1", "3"))
    assert other.exit_code == 2
    assert "teacher.classes 'kept 2 of 12, " in other.output


def test_a_run_without_choices_has_no_new_settings(tmp_path, photos):
    out = tmp_path / "labels"
    assert generate(photos, out, "--keep-classes", "all").exit_code == 0
    keys = set(LabelSet.open(out).index["teacher"])
    assert keys == {
        *("name", "weights_sha256", "timm_version", "precision", "image_size", "stride"),
        *("mean", "std", "interpolation"),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "has 2 classes, test_resnet has 12. Choose"),
        (["--keep-classes", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
        (["--keep-classes", "all", "--class-map", "x.csv"], "give either --keep-classes or"),
        (["--keep-classes", "folders"], "test_resnet has no class 'bird'"),
    ],
)
def test_mistakes_are_one_line_before_any_work(photos, tmp_path, words, message):
    result = generate(photos, tmp_path / "labels", *words)
    assert result.exit_code == 2
    assert message in result.output.splitlines()[-1]
    assert not list((tmp_path / "labels").iterdir())


def test_numbered_folders_take_the_teachers_names(tmp_path, photos):
    for i in range(12):
        (tmp_path / "numbered" / str(i)).mkdir(parents=True)
    (photo,) = (photos / "photos" / "dog").glob("2.*")
    (tmp_path / "numbered" / "3" / "a.png").write_bytes(photo.read_bytes())
    names = [f"a thing of kind {letter}" for letter in "abcdefghijkl"]
    source = open_source(tmp_path / "numbered")
    for teacher_names, wanted in ((names, names), (None, source.class_names)):
        teacher = small_teacher(label_names=teacher_names)
        out = tmp_path / ("named" if teacher_names else "unnamed")
        generate_maps(source, out, teacher=teacher)
        assert LabelSet.open(out).class_names == wanted


def test_a_set_of_another_teacher_is_not_read_with_its_classes():
    index = {"teacher": {"class_members": [11, 3]}, "class_names": ["a", "b"]}
    space = space_of_set(index, ClassList("twelve", 12))
    assert space is not None and list(space.members) == [[11], [3]]
    with pytest.raises(ValueError, match="with class 11 of its teacher, but pets has 6 classes"):
        space_of_set(index, PETS)
    assert space_of_set({"teacher": {"name": "x"}}, PETS) is None


def test_a_teachers_classes_can_be_listed(photos):
    result = CliRunner().invoke(label, ["classes", "--teacher", "vit_base_patch16_224"])
    assert result.exit_code == 0
    assert result.output.splitlines()[207] == "n02099601\tgolden retriever"
    words = ["classes", "--teacher", "test_resnet", "--checkpoint", str(photos / "teacher.pth")]
    assert CliRunner().invoke(label, words).output.split() == [str(i) for i in range(12)]
