"""Listing image folders: keys, classes, and what is said about folders that do not fit."""

import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenlabel.labeler.sources import escape, open_source, unescape

FILE_PATHS = st.text(
    st.characters(exclude_characters="\0", exclude_categories=()), min_size=1
).filter(lambda path: _fits_a_file_system(path))


def _fits_a_file_system(path: str) -> bool:
    try:
        return os.fsdecode(os.fsencode(path)) == path
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return False


def _fill(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"content is not read when listing")
    return root


def _keys(root: Path) -> list[str]:
    return [sample.key for sample in open_source(root).samples]


# ---------------------------------------------------------------------------------------- keys


def test_files_that_differ_only_behind_the_first_dot_stay_apart(tmp_path: Path):
    assert _keys(_fill(tmp_path, "cat/a.b.jpg", "cat/a.c.jpg")) == ["cat/a%2Eb", "cat/a%2Ec"]


def test_class_folders_with_dots_and_spaces_give_one_key_per_image(tmp_path: Path):
    _fill(tmp_path, "001.Black footed/x 1.jpg", "001.Black footed/x 2.jpg", "002.Sooty/x 1.jpg")
    source = open_source(tmp_path)
    assert [(sample.key, sample.class_index) for sample in source.samples] == [
        ("001.Black%20footed/x%201", 0),
        ("001.Black%20footed/x%202", 0),
        ("002.Sooty/x%201", 1),
    ]
    assert source.class_ids == ["001.Black footed", "002.Sooty"]


def test_unicode_names_keep_their_letters(tmp_path: Path):
    source = open_source(_fill(tmp_path, "ünï/字.jpg"))
    assert source.samples[0].key == "ünï/字"
    assert source.read(source.samples[0]) == b"content is not read when listing"


def test_file_names_that_are_no_text_get_a_key(tmp_path: Path):
    name = os.fsdecode(b"a/\xff\xfe")
    assert _keys(_fill(tmp_path, name + ".jpg")) == ["a/%FF%FE"]
    assert unescape("a/%FF%FE") == name


def test_folders_that_webdataset_would_skip_are_escaped(tmp_path: Path):
    assert _keys(_fill(tmp_path, "__background__/x.jpg")) == ["%5F_background__/x"]


@given(FILE_PATHS)
def test_unescape_undoes_escape(path: str):
    key = escape(path)
    assert unescape(key) == path
    assert not any(char.isspace() for char in key)
    assert "." not in key.rpartition("/")[2]
    key.encode()  # raises where the key is no text


@given(FILE_PATHS, FILE_PATHS)
def test_two_paths_never_share_a_key(first: str, second: str):
    assert (escape(first) == escape(second)) == (first == second)


def test_two_files_with_one_key_are_named(tmp_path: Path):
    _fill(tmp_path, "cat/x.jpg", "cat/x.png")
    with pytest.raises(ValueError, match=r"cat/x\.jpg and cat/x\.png .* share the key 'cat/x'"):
        open_source(tmp_path)


def test_samples_are_sorted_by_the_bytes_of_their_key(tmp_path: Path):
    _fill(
        tmp_path, "b/x.jpg", "a/y.jpg", "a/B.jpg", "a/é.jpg", "a/deep/er/z.jpg", "a/\U0001f600.jpg"
    )
    keys = _keys(tmp_path)
    assert keys == sorted(keys, key=str.encode)
    assert set(keys) == {"b/x", "a/y", "a/B", "a/é", "a/deep/er/z", "a/\U0001f600"}


# ------------------------------------------------------------------------------------- classes


def test_classes_follow_the_sorted_folder_names(tmp_path: Path):
    source = open_source(_fill(tmp_path, "dog/1.jpg", "Cat/1.PNG", "ant/sub/1.webp"))
    assert source.class_ids == source.class_names == ["Cat", "ant", "dog"]
    assert {s.key: s.class_index for s in source.samples} == {
        "Cat/1": 0,
        "ant/sub/1": 1,
        "dog/1": 2,
    }
    assert source.num_classes == 3


def test_a_class_folder_without_images_keeps_its_index(tmp_path: Path):
    _fill(tmp_path, "a/1.jpg", "c/1.jpg")
    (tmp_path / "b").mkdir()
    assert [s.class_index for s in open_source(tmp_path).samples] == [0, 2]


def test_classes_txt_gives_indices_and_names(tmp_path: Path):
    _fill(tmp_path, "dog/1.jpg", "cat/1.jpg")
    (tmp_path / "classes.txt").write_text("zebra\ndog\tDog, domestic\ncat\n", encoding="utf-8-sig")
    source = open_source(tmp_path)
    assert source.class_ids == ["zebra", "dog", "cat"]
    assert source.class_names == ["zebra", "Dog, domestic", "cat"]
    assert [(s.key, s.class_index) for s in source.samples] == [("cat/1", 2), ("dog/1", 1)]


def test_a_given_classes_file_goes_before_the_one_in_the_folder(tmp_path: Path):
    _fill(tmp_path / "images", "dog/1.jpg", "cat/1.jpg")
    (tmp_path / "images/classes.txt").write_text("cat\ndog\n")
    (tmp_path / "other.txt").write_bytes(b"dog\r\ncat\r\n")
    source = open_source(tmp_path / "images", classes=tmp_path / "other.txt")
    assert source.class_ids == ["dog", "cat"]


def test_classes_txt_must_name_every_class_folder(tmp_path: Path):
    _fill(tmp_path, "dog/1.jpg", "cat/1.jpg")
    (tmp_path / "classes.txt").write_text("1 dog\n2 cat\n")
    with pytest.raises(
        ValueError, match="does not name 2 class folders: 'cat', 'dog'; .*line 1 names '1 dog'"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"cat\n\ndog\n", "line 2: no folder name"),
        (b"cat\ndog\ncat\n", "line 3: class 'cat' stands in line 1 already"),
        (b"cat\nd\xf6g\n", "is not UTF-8 text"),
    ],
)
def test_a_bad_classes_file_is_named(tmp_path: Path, content: bytes, problem: str):
    _fill(tmp_path, "cat/1.jpg")
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"classes.txt.*{problem}"):
        open_source(tmp_path)


def test_a_missing_classes_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        open_source(_fill(tmp_path, "cat/1.jpg"), classes=tmp_path / "nowhere.txt")


def test_wordnet_folders_get_their_imagenet_names(tmp_path: Path):
    source = open_source(_fill(tmp_path, "n01440764/1.JPEG", "n02123045/1.JPEG"))
    assert source.class_ids == ["n01440764", "n02123045"]
    assert source.class_names[0].startswith("tench")
    assert source.class_names[1].startswith("tabby")


def test_wordnet_folders_beyond_the_thousand_keep_their_ids(tmp_path: Path):
    source = open_source(_fill(tmp_path, "n01440764/1.JPEG", "n99999999/1.JPEG"))
    assert source.class_names[1] == "n99999999"


# ----------------------------------------------------------------------- folders that do not fit


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="/photos does not exist"):
        open_source(tmp_path / "photos")


def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(tmp_path: Path):
    with pytest.raises(ValueError, match=r"neither a folder nor .*\.tar \.zip.* nor a list.*\.csv"):
        open_source(_fill(tmp_path, "x.npy") / "x.npy")


def test_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no images in .*; expected .*/CLASS/IMAGE.*\.jpeg"):
        open_source(tmp_path)


def test_a_folder_of_tars_says_how_shards_are_given(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"no images in .*, but tar files; .*--images '.*/\*\.tar'"
    ):
        open_source(_fill(tmp_path, "0.tar", "1.tar"))


def test_a_folder_without_folders_holds_images_without_classes(tmp_path: Path):
    source = open_source(_fill(tmp_path, "b.jpg", "a.jpg"))
    assert [(sample.key, sample.class_index) for sample in source.samples] == [
        ("a", None),
        ("b", None),
    ]
    assert (source.num_classes, source.class_ids, source.class_names) == (0, [], [])


def test_images_beside_class_folders_are_refused(tmp_path: Path):
    _fill(tmp_path, "a.jpg", "b.jpg", "cat/c.jpg")
    with pytest.raises(ValueError, match=r"2 images lie directly in .*first: a\.jpg.*/CLASS/IMAGE"):
        open_source(tmp_path)


def test_images_without_folders_cannot_be_given_classes(tmp_path: Path):
    _fill(tmp_path / "photos", "a.jpg", "b.jpg")
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="2 images lie directly in"):
        open_source(tmp_path / "photos", classes=tmp_path / "names.txt")


def test_a_folder_of_splits_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"are splits, not classes \(train, val\); give .*/train"):
        open_source(_fill(tmp_path, "train/cat/1.jpg", "val/cat/1.jpg"))


def test_a_class_may_be_called_train(tmp_path: Path):
    assert open_source(_fill(tmp_path, "train/1.jpg")).class_ids == ["train"]


def test_a_class_folder_whose_name_is_no_text_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is not UTF-8; rename it"):
        open_source(_fill(tmp_path, os.fsdecode(b"\xff/1.jpg")))


def test_other_and_hidden_files_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    _fill(tmp_path, "cat/1.jpg", "cat/._1.jpg", "cat/notes.txt", ".git/x.jpg", "classes.txt")
    (tmp_path / "classes.txt").write_text("cat\n")
    with caplog.at_level(logging.INFO):
        assert _keys(tmp_path) == ["cat/1"]
    assert "left out 2 files, ending in none of .jpg" in caplog.text


def test_links_are_followed_but_not_in_circles(tmp_path: Path):
    _fill(tmp_path / "store", "1.jpg")
    _fill(tmp_path / "images", "dog/1.jpg")
    (tmp_path / "images/cat").symlink_to(tmp_path / "store")
    (tmp_path / "store/up").symlink_to(tmp_path / "images")
    keys = _keys(tmp_path / "images")
    assert keys == ["cat/1", "dog/1"]
