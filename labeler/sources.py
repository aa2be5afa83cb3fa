"""Where images come from: a folder with one folder per class.

A sample's key is its path below the root without the suffix, '/'-separated, with the few
characters escaped that WebDataset or DALI would misread inside a tar. `unescape` turns it back.
"""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
CLASSES_FILE = "classes.txt"

_logger = logging.getLogger(__name__)
_WNID = re.compile(r"n\d{8}")
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})
_NUM_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Sample:
    """One image that a source lists; nothing is read yet."""

    key: str
    """Path below the root without suffix, escaped; unique within the source."""
    file: str
    """Where the bytes are. A str: millions of Path objects would take gigabytes."""
    class_index: int | None
    """Index into the source's class_ids; None where a source has no classes."""

    @property
    def path(self) -> Path:
        """Where the bytes are, as a Path."""
        return Path(self.file)


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images in class folders: ROOT/CLASS/**/NAME.jpg."""

    root: Path
    samples: list[Sample]
    """Sorted by key as UTF-8 bytes: the same list on every machine."""
    class_ids: list[str]
    """Folder names, in the order of the class indices."""
    class_names: list[str]
    """What people read, one per class id."""

    @property
    def num_classes(self) -> int:
        """Number of classes, those without an image in this folder included."""
        return len(self.class_ids)

    def read(self, sample: Sample) -> bytes:
        """Return the file as it is on disk."""
        return sample.path.read_bytes()


def open_source(images: Path, *, classes: Path | None = None) -> ImageFolder:
    """List the images below a folder.

    The first folder below the root is the class. Class indices follow the sorted folder names,
    unless `classes.txt` stands in the root (or `classes` is given): one class a line, FOLDER or
    FOLDER<TAB>display name, and the line number is the index. Such a list may name classes that
    have no folder here, so that a few photos can keep the indices of a thousand classes.

    Files with other suffixes and hidden files are left out and counted in the log.

    Args:
        images: The root.
        classes: A classes file elsewhere than in the root.

    Raises:
        OSError: If the root or the classes file does not exist or cannot be read.
        ValueError: If there are no images, images outside class folders, class folders that the
            classes file does not name, or two files with one key.
    """
    if not images.is_dir():
        kind = "is a file, not a folder" if images.exists() else "does not exist"
        raise FileNotFoundError(f"image folder {images} {kind}")
    files, num_ignored = _list_images(images)
    if num_ignored:
        _logger.info("%s: left out %d files that are not images", images, num_ignored)
    folders = sorted(
        entry.name for entry in os.scandir(images) if entry.is_dir() and entry.name[0] != "."
    )
    _check_layout(images, files, folders)
    _check_utf8(images, folders)
    if classes is None and (images / CLASSES_FILE).is_file():
        classes = images / CLASSES_FILE
    if classes is None:
        class_ids, class_names = folders, _display_names(folders)
    else:
        class_ids, class_names = _read_classes(classes)
        _check_folders_listed(folders, class_ids, classes)
    return ImageFolder(images, _samples(images, files, class_ids), class_ids, class_names)


def escape(path: str) -> str:
    """Turn a '/'-separated path without suffix into a key.

    WebDataset and DALI cut a name at the first dot behind the last '/', DALI's index separates
    its columns by blanks, its script doubles backslashes, and WebDataset skips names that begin
    with __word__. Such characters, and bytes that are no UTF-8, become %XX, as in a URL.
    """
    folder, slash, name = path.rpartition("/")
    key = _percent(folder, _KEY_UNSAFE) + slash + _percent(name, _NAME_UNSAFE)
    return "%5F" + key[1:] if _SKIPPED_BY_WEBDATASET.match(key) else key


def unescape(key: str) -> str:
    """Turn a key back into the path below the root, without suffix."""
    data = re.sub(rb"%([0-9A-F]{2})", lambda m: bytes([int(m[1], 16)]), key.encode())
    return os.fsdecode(data)


_KEY_UNSAFE = re.compile(r"[%\\\s\x00-\x20\x7f\ud800-\udfff]")
_NAME_UNSAFE = re.compile(r"[.%\\\s\x00-\x20\x7f\ud800-\udfff]")
_SKIPPED_BY_WEBDATASET = re.compile(r"__[^/]*__($|/)")


def _percent(text: str, unsafe: re.Pattern[str]) -> str:
    return unsafe.sub(lambda m: "".join(f"%{b:02X}" for b in os.fsencode(m[0])), text)


def _list_images(root: Path) -> tuple[list[str], int]:
    """Return the images below root as relative paths, and the number of other files."""
    files, num_ignored = [], 0
    for path in _walk(str(root), "", ()):
        if _is_image(path.rpartition("/")[2]):
            files.append(path)
        elif path != CLASSES_FILE:
            num_ignored += 1
    return files, num_ignored


def _is_image(name: str) -> bool:
    _, dot, suffix = name.rpartition(".")
    return name[0] != "." and dot + suffix.lower() in IMAGE_SUFFIXES


def _walk(folder: str, prefix: str, parents: tuple[str, ...]) -> Iterator[str]:
    """Yield the files below a folder, following links but never a link to a parent."""
    real = os.path.realpath(folder)
    if real in parents:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield prefix + entry.name
            elif entry.name[0] != ".":
                yield from _walk(entry.path, f"{prefix}{entry.name}/", (*parents, real))


def _check_layout(root: Path, files: list[str], folders: list[str]) -> None:
    loose = sorted(file for file in files if "/" not in file)
    if loose:
        raise ValueError(
            f"{len(loose)} images lie directly in {root} (first: {loose[0]}), outside any class "
            f"folder; expected {root}/CLASS/IMAGE.jpg: put every image into a folder named after "
            "its class"
        )
    if not files:
        raise ValueError(
            f"no images in {root}; expected {root}/CLASS/IMAGE with one of the suffixes "
            f"{' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    if _SPLIT_NAMES.issuperset(folders) and all(file.count("/") > 1 for file in files):
        raise ValueError(
            f"the folders of {root} are splits, not classes ({', '.join(folders)}); "
            f"give one of them, e.g. {root / folders[0]}"
        )


def _check_utf8(root: Path, folders: list[str]) -> None:
    for folder in folders:
        try:
            folder.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the name of class folder {folder!r} in {root} is not UTF-8; rename it"
            ) from error


def _read_classes(path: Path) -> tuple[list[str], list[str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if lines == [""]:
        raise ValueError(f"{path} is empty; expected one class a line: FOLDER or FOLDER<TAB>name")
    ids, names, line_of = [], [], {}
    for number, line in enumerate(lines, start=1):
        folder, tab, name = line.partition("\t")
        if not folder.strip():
            raise ValueError(f"{path}, line {number}: no folder name; the line number is the index")
        if folder in line_of:
            raise ValueError(
                f"{path}, line {number}: class {folder!r} stands in line {line_of[folder]} already"
            )
        line_of[folder] = number
        ids.append(folder)
        names.append(name.strip() or folder)
    return ids, names


def _check_folders_listed(folders: list[str], class_ids: list[str], classes: Path) -> None:
    unlisted = sorted(set(folders).difference(class_ids))
    if unlisted:
        shown = ", ".join(map(repr, unlisted[:_NUM_SHOWN]))
        raise ValueError(
            f"{classes} does not name {len(unlisted)} class folders: {shown}"
            f"{', …' if len(unlisted) > _NUM_SHOWN else ''}; it holds one class a line, FOLDER or "
            f"FOLDER<TAB>name (line 1 names {class_ids[0]!r})"
        )
    if not set(folders).intersection(class_ids):
        raise ValueError(f"{classes} names none of the class folders")


def _display_names(folders: list[str]) -> list[str]:
    if not all(map(_WNID.fullmatch, folders)):
        return folders
    from timm.data.imagenet_info import ImageNetInfo  # slow to import, and few folders need it

    info = ImageNetInfo()
    known = set(info.label_names())
    return [info.label_name_to_description(wnid) if wnid in known else wnid for wnid in folders]


def _samples(root: Path, files: list[str], class_ids: list[str]) -> list[Sample]:
    index_of = {folder: index for index, folder in enumerate(class_ids)}
    file_of: dict[str, str] = {}
    for file in files:
        key = escape(file.rpartition(".")[0])
        other = file_of.setdefault(key, file)
        if other != file:
            first, second = sorted((other, file))
            raise ValueError(
                f"{first} and {second} in {root} would share the key {key!r}; "
                "rename or remove one of them"
            )
    return [
        Sample(key, f"{root}/{file}", index_of[file.partition("/")[0]])
        for key, file in sorted(file_of.items())
    ]
