"""Which images a folder, an archive, WebDataset shards or a list file hold, and of what class.

Nothing is decoded here. `sources.open_source` turns a listing into sorted samples with keys.
"""

import csv
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from . import archives, storage
from .archives import Contents, Member

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Of a WebDataset sample that has several of these, the first is the image."""
LIST_SUFFIXES = (".csv", ".tsv", ".txt")
CLASSES_FILE = "classes.txt"

_PACKED_INDEX = "index.json"
_PACKED_FORMAT = "tokenlabel-shards"
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})
SKIPPED_BY_WEBDATASET = re.compile(r"__[^/]*__($|/)")
"""Names that begin like this are no samples."""

_IN_ARCHIVE = re.compile(r"(.+\.(?:tar|zip))/(.+?)/*", re.IGNORECASE)
_NUM_LISTERS = 16

_logger = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ListedFile(NamedTuple):
    """An image."""

    path: str
    """Below the root, or in the shard; with suffix, '/'-separated."""
    file: str
    """The image's own file, or the archive."""
    offset: int | None
    num_bytes: int | None
    label: str | None
    """Its class: a class folder's name, a list's word, or a number."""


@dataclass(frozen=True)
class Classes:
    """What a classes file says."""

    where: str
    ids: list[str]
    names: list[str]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Images in no order, and what is known about their classes."""

    name: str
    """What the user gave."""
    files: list[ListedFile]
    labels: list[str]
    """All classes, sorted, those without an image too; empty for images without classes."""
    classes: Classes | None
    """Order and names of the classes, where the source has a file that gives them."""
    num_ignored: int = 0
    """Files that are no images."""
    is_numbered: bool = False
    """Whether labels are class indices in digits."""
    are_shards: bool = False
    """Whether paths are named after WebDataset's keys."""


# -------------------------------------------------------------------------------------- folders


def list_folder(folder: str, *, with_classes: bool = False) -> Listing:
    """List a folder of class folders, or of images without classes.

    Args:
        folder: The root.
        with_classes: Whether the user has named classes, so that there must be class folders.

    Raises:
        ValueError: If there are no images, or images beside class folders.
    """
    files, num_ignored, has_tars = [], 0, False
    for path in _walk(folder, "", ()):
        if _is_image(path.rpartition("/")[2]):
            files.append(ListedFile(path, f"{folder}/{path}", None, None, _top(path)))
        elif path != CLASSES_FILE:
            num_ignored += 1
            has_tars |= path.endswith(".tar")
    if has_tars and not files:
        raise ValueError(
            f"no images in {folder}, but tar files; if they are WebDataset shards, "
            f"give --images '{folder}/*.tar'"
        )
    entries = os.scandir(folder)
    tops = [entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()]
    classes_file = Path(folder, CLASSES_FILE)
    classes = read_classes(classes_file) if classes_file.is_file() else None
    return _tree(folder, files, tops, classes, num_ignored, with_classes=with_classes)


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


def _is_image(name: str) -> bool:
    _, dot, suffix = name.rpartition(".")
    return name[0] != "." and dot + suffix.lower() in IMAGE_SUFFIXES


def _top(path: str) -> str | None:
    """Return the first folder of a file's path; one string for all paths that share it."""
    folder, slash, _ = path.partition("/")
    return sys.intern(folder) if slash else None


def _tree(
    name: str,
    files: list[ListedFile],
    tops: Iterable[str],
    classes: Classes | None,
    num_ignored: int,
    *,
    with_classes: bool,
) -> Listing:
    """Take the first folders below a root as classes, unless all images lie outside of them."""
    loose = sorted(file.path for file in files if "/" not in file.path)
    if not files:
        raise ValueError(
            f"no images in {name}; expected {name}/CLASS/IMAGE, or images without classes, with "
            f"one of the suffixes {' '.join(IMAGE_SUFFIXES)}"
        )
    if len(loose) == len(files) and not with_classes and classes is None:
        return Listing(name=name, files=files, labels=[], classes=None, num_ignored=num_ignored)
    if loose:
        raise ValueError(
            f"{len(loose)} images lie directly in {name} (first: {loose[0]}), outside any class "
            f"folder; expected {name}/CLASS/IMAGE.jpg: put every image into a folder named after "
            "its class"
        )
    labels = sorted(set(tops).union(file.label for file in files if file.label is not None))
    if _SPLIT_NAMES.issuperset(labels) and all(file.path.count("/") > 1 for file in files):
        raise ValueError(
            f"the folders of {name} are splits, not classes ({', '.join(labels)}); "
            f"give one of them, e.g. {name}/{labels[0]}"
        )
    for label in labels:
        if not _is_text(label):
            raise ValueError(
                f"the name of class folder {label!r} in {name} is not UTF-8; rename it"
            )
    return Listing(name=name, files=files, labels=labels, classes=classes, num_ignored=num_ignored)


def _is_text(name: str) -> bool:
    return not re.search("[\ud800-\udfff]", name)


# ------------------------------------------------------------------------------------- archives


def list_archives(name: str, *, with_classes: bool = False) -> Listing:
    """List an archive, a folder in one (ARCHIVE.tar/FOLDER), or shards that a pattern names.

    Args:
        name: Local or a URL.
        with_classes: As for list_folder.

    Raises:
        OSError: If an archive does not exist or cannot be read.
        ValueError: If one is damaged, there are no images, or images beside class folders.
    """
    pattern, folder = _split_archive(name)
    check_kind(pattern)
    locations = _in_parallel(storage.with_ranges, _expanded(pattern))
    listed = _in_parallel(archives.list_archive, locations)
    if storage.is_pattern(pattern) or _has_class_numbers(listed[0]):
        if folder:
            raise ValueError(f"{pattern} holds WebDataset samples; leave /{folder} out")
        return _shards(name, locations, listed)
    (location,), (contents,) = locations, listed
    contents = _with_class_tars(location, _below(contents, folder))
    if not folder:
        name, contents = _without_common_folder(name, contents)
    files = [
        _in_archive(location, member, _top(member.name))
        for member in contents.members
        if _is_image_member(member)
    ]
    classes = _classes_in(name, location, contents)
    num_ignored = len(contents.members) - len(files) - (classes is not None)
    tops = [path.partition("/")[0] for path in contents.folders]
    return _tree(name, files, tops, classes, num_ignored, with_classes=with_classes)


def _split_archive(name: str) -> tuple[str, str]:
    """Split ARCHIVE.tar/FOLDER; the folder is empty where the archive's root is meant."""
    match = _IN_ARCHIVE.fullmatch(name)
    if name.lower().endswith(archives.SUFFIXES) or match is None:
        return name, ""
    return match[1], match[2]


def check_kind(pattern: str) -> None:
    """Raise OSError where there is no such archive, ValueError where it is of no known kind."""
    if storage.is_url(pattern) and pattern.lower().endswith(".zip"):
        raise ValueError(f"{pattern}: zip files are read locally only; download it first")
    if storage.is_url(pattern) or storage.is_pattern(pattern):
        return
    if not Path(pattern).exists():
        raise FileNotFoundError(f"{pattern} does not exist")
    if not pattern.lower().endswith((*archives.SUFFIXES, *archives.COMPRESSED_SUFFIXES)):
        raise ValueError(
            f"{pattern} is neither a folder nor an archive ({' '.join(archives.SUFFIXES)}) nor a "
            f"list of images ({' '.join(LIST_SUFFIXES)})"
        )


def _expanded(pattern: str) -> list[str]:
    locations = storage.expand(pattern)
    for location in locations:
        if not (storage.is_url(location) or Path(location).exists()):
            raise FileNotFoundError(f"{location}, one of {pattern}, does not exist")
    return locations


def _in_parallel(function: Callable[[_Item], _Result], items: list[_Item]) -> list[_Result]:
    """Map in threads: headers are far apart, and disks and servers serve many at a time."""
    pool = ThreadPoolExecutor(_NUM_LISTERS, "list")
    try:
        results = pool.map(function, items)
        hidden = True if len(items) < _NUM_LISTERS else None
        return list(tqdm(results, "list archives", len(items), leave=False, disable=hidden))
    finally:
        pool.shutdown(cancel_futures=True)


def _with_class_tars(location: str, contents: Contents) -> Contents:
    """Put the members of inner tars into folders named after them, if there are only tars."""
    tars = [member for member in contents.members if _is_tar(member)]
    if (
        not tars
        or location.lower().endswith(".zip")
        or any(map(_is_image_member, contents.members))
    ):
        return contents
    inner = _in_parallel(
        lambda tar: archives.list_tar(location, tar.offset, tar.offset + tar.num_bytes), tars
    )
    result = Contents([member for member in contents.members if not _is_tar(member)], [])
    for tar, tar_contents in zip(tars, inner):
        folder = tar.name.removesuffix(".tar")
        # Packed from outside the class folder, its name is in the tar already.
        again = f"{folder.rpartition('/')[2]}/"
        if not all(member.name.startswith(again) for member in tar_contents.members):
            again = ""
        result.folders.append(folder)
        result.members.extend(
            member._replace(name=f"{folder}/{member.name.removeprefix(again)}")
            for member in tar_contents.members
        )
    return result


def _is_tar(member: Member) -> bool:
    return member.name.endswith(".tar") and member.name.rpartition("/")[2][0] != "."


def _is_image_member(member: Member) -> bool:
    return _is_image(member.name.rpartition("/")[2])


def _below(contents: Contents, folder: str) -> Contents:
    """Return what lies below a folder of an archive, without hidden files and folders."""
    prefix = folder + "/" if folder else ""
    return Contents(
        [
            member._replace(name=member.name.removeprefix(prefix)) if prefix else member
            for member in contents.members
            if member.name.startswith(prefix) and _is_visible(member.name.rpartition("/")[0])
        ],
        [
            path.removeprefix(prefix)
            for path in contents.folders
            if path.startswith(prefix) and _is_visible(path)
        ],
    )


def _is_visible(folder: str) -> bool:
    """Tell whether a folder is neither hidden nor one that macOS adds to archives."""
    return not any(part[:1] == "." or part == "__MACOSX" for part in folder.split("/"))


def _without_common_folder(name: str, contents: Contents) -> tuple[str, Contents]:
    """Take the only folder of an archive as its root, where class folders follow in it.

    Returns:
        What to call the root, and what lies below it.
    """
    images = [member.name for member in contents.members if _is_image_member(member)]
    tops = {path.partition("/")[0] for path in (*images, *contents.folders)}
    has_classes_file = any(member.name == CLASSES_FILE for member in contents.members)
    if len(tops) != 1 or has_classes_file or any(path.count("/") < 2 for path in images):
        return name, contents
    (top,) = tops
    _logger.info("%s: all images lie in %s/, which is taken as the root", name, top)
    return _without_common_folder(f"{name}/{top}", _below(contents, top))


def _in_archive(location: str, member: Member, label: str | None) -> ListedFile:
    return ListedFile(member.name, location, member.offset, member.num_bytes, label)


def _classes_in(name: str, location: str, contents: Contents) -> Classes | None:
    for member in contents.members:
        if member.name == CLASSES_FILE:
            data = archives.read_member(location, member.offset, member.num_bytes)
            return parse_classes(data, f"{CLASSES_FILE} in {name}")
    return None


# --------------------------------------------------------------------------------------- shards


def _has_class_numbers(contents: Contents) -> bool:
    return any(member.name.endswith(".cls") for member in contents.members)


def _shards(name: str, locations: list[str], listed: list[Contents]) -> Listing:
    """Take each run of members with one name before the first dot as a sample."""
    files: list[ListedFile] = []
    num_ignored = 0
    for location, contents in zip(locations, listed):
        for key, members in groupby(contents.members, lambda member: shard_stem(member.name)):
            fields = _fields(location, key, members)
            image = next((fields[s] for s in IMAGE_SUFFIXES if s in fields), None)
            if image is None or SKIPPED_BY_WEBDATASET.match(key):
                num_ignored += len(fields)
                continue
            label = _class_number(location, fields[".cls"]) if ".cls" in fields else None
            files.append(_in_archive(location, image, label))
    if not files:
        raise ValueError(
            f"no images in {name}; expected samples with one of the fields "
            f"{' '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}"
        )
    labels = {file.label for file in files}
    if None in labels and len(labels) > 1:
        bare = next(file for file in files if file.label is None)
        raise ValueError(f"{bare.path} in {bare.file} has no .cls, though other samples have")
    return Listing(
        name=name,
        files=files,
        labels=sorted(label for label in labels if label is not None),
        classes=_packed_classes(locations[0]),
        num_ignored=num_ignored,
        is_numbered=True,
        are_shards=True,
    )


def shard_stem(name: str) -> str:
    """Return the part of a member's name that WebDataset takes as the key."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _fields(location: str, key: str, members: Iterable[Member]) -> dict[str, Member]:
    """Return the members of a sample by what follows the key, e.g. ".jpg"."""
    fields: dict[str, Member] = {}
    for member in members:
        suffix = member.name[len(key) :].lower()
        if suffix in fields:
            raise ValueError(
                f"{location}: {member.name} is there twice, at offsets {fields[suffix].offset} "
                f"and {member.offset}"
            )
        fields[suffix] = member
    return fields


def _class_number(location: str, member: Member) -> str:
    digits = (member.content or b"").strip()
    if not digits.isdigit():
        raise ValueError(
            f"{location}: {member.name} at offset {member.offset} holds {digits!r}, expected a "
            "class index in digits"
        )
    return sys.intern(digits.decode())


def _packed_classes(location: str) -> Classes | None:
    """Return the classes of a data set made by tl-shard pack, if the shard belongs to one."""
    index = Path(location).with_name(_PACKED_INDEX)
    if storage.is_url(location) or not index.is_file():
        return None
    try:
        facts = json.loads(index.read_bytes())
        if facts["format"] == _PACKED_FORMAT:
            ids, names = ([str(x) for x in facts[field]] for field in ("class_ids", "class_names"))
            return Classes(str(index), ids, names)
    except (ValueError, KeyError, TypeError):
        _logger.warning("%s could not be read; the names of the classes are unknown", index)
    return None


# ---------------------------------------------------------------------------------------- lists


def list_file(path: Path, root: Path | str | None) -> Listing:
    """List the images that a text file names, one a line: PATH, or PATH and CLASS.

    Args:
        path: Of the list; apart by tabs if its first line holds one, else by commas (as CSV).
        root: Folder or archive that the paths start from; None means the list's own folder.

    Raises:
        OSError: If the list, the root or the first image does not exist.
        ValueError: If a line cannot be understood, or a path leads out of the root.
    """
    rows = _rows(path)
    place = _places(str(path.parent if root is None else root))
    files = []
    for number, (image, label) in rows.items():
        try:
            files.append(place(image)._replace(label=label))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if files[0].offset is None and not Path(files[0].file).exists():
        raise FileNotFoundError(
            f"{path}: its first image, {files[0].file}, does not exist; --root names the folder or "
            "archive that the paths start from"
        )
    labels = sorted({file.label for file in files if file.label is not None})
    classes_file = Path(root or path.parent, CLASSES_FILE)
    return Listing(
        name=str(path),
        files=files,
        labels=labels,
        classes=read_classes(classes_file) if labels and classes_file.is_file() else None,
        is_numbered=all(label.isdecimal() and label.isascii() for label in labels),
    )


def _rows(path: Path) -> dict[int, tuple[str, str | None]]:
    """Return path and class by line number."""
    lines = _read_text(path.read_bytes(), str(path)).split("\n")
    is_tabbed = "\t" in lines[0]
    rows: dict[int, tuple[str, str | None]] = {}
    num_columns = None
    for number, line in enumerate(lines, start=1):
        try:
            cells = line.split("\t") if is_tabbed else next(csv.reader([line]), [])
        except csv.Error as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        is_heading = number == 1 and not any(map(_has_image_suffix, cells))
        if is_heading or not line.strip():
            continue
        if len(cells) > 2 or not _has_image_suffix(cells[0]) or not cells[-1].strip():
            raise ValueError(
                f"{path}, line {number}: {line!r:.80} is not PATH, PATH,CLASS or PATH<TAB>CLASS "
                f"with one of the suffixes {' '.join(IMAGE_SUFFIXES)}"
            )
        num_columns = num_columns or len(cells)
        if len(cells) != num_columns:
            raise ValueError(
                f"{path}, line {number}: {line!r:.80} has {'a' if len(cells) == 2 else 'no'} "
                "class, unlike the lines before; name the class of every image or of none"
            )
        rows[number] = cells[0], sys.intern(cells[1].strip()) if len(cells) == 2 else None
    if not rows:
        raise ValueError(f"{path} names no images; expected PATH, PATH,CLASS or PATH<TAB>CLASS")
    return rows


def _has_image_suffix(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES)


def _places(root: str) -> Callable[[str], ListedFile]:
    """Return a function that finds an image by its path below the root."""
    if not Path(root).is_dir():
        return _places_in_archive(root)
    absolute = os.path.abspath(root)  # noqa: PTH100 (as the user sees it: links stay)

    def place(image: str) -> ListedFile:
        full = os.path.normpath(os.path.join(absolute, image))  # noqa: PTH118
        if not full.startswith(absolute.rstrip("/") + "/"):
            raise ValueError(f"{image} leads out of {root}; --root names the folder to start from")
        below = full[len(absolute.rstrip("/")) + 1 :]
        return ListedFile(below, f"{root}/{below}", None, None, None)

    return place


def _places_in_archive(root: str) -> Callable[[str], ListedFile]:
    pattern, folder = _split_archive(root)
    found: dict[str, ListedFile] = {}
    for location in map(storage.with_ranges, _expanded(pattern)):
        contents = _below(archives.list_archive(location), folder)
        for member in _with_class_tars(location, contents).members:
            found[member.name] = _in_archive(location, member, None)

    def place(image: str) -> ListedFile:
        try:
            return found[os.path.normpath(image)]
        except KeyError as error:
            raise ValueError(f"{image} is not in {root}") from error

    return place


# ------------------------------------------------------------------------------------- classes


def read_classes(path: Path) -> Classes:
    """Read a classes file: one class a line, CLASS or CLASS<TAB>display name.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is empty or names a class twice.
    """
    return parse_classes(path.read_bytes(), str(path))


def parse_classes(data: bytes, where: str) -> Classes:
    """Parse the content of a classes file, as read_classes."""
    lines = _read_text(data, where).rstrip().split("\n")
    if lines == [""]:
        raise ValueError(f"{where} is empty; expected one class a line: FOLDER or FOLDER<TAB>name")
    ids, names, line_of = [], [], {}
    for number, line in enumerate(lines, start=1):
        folder, tab, name = line.partition("\t")
        if not folder.strip():
            raise ValueError(
                f"{where}, line {number}: no folder name; the line number is the index"
            )
        if folder in line_of:
            raise ValueError(
                f"{where}, line {number}: class {folder!r} stands in line {line_of[folder]} already"
            )
        line_of[folder] = number
        ids.append(folder)
        names.append(name.strip() or folder)
    return Classes(where, ids, names)


def _read_text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error}") from error
