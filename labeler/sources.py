"""Where images come from: folders, tar and zip files, WebDataset shards, lists.

Whatever holds the images, the same images have the same keys in the same order. A sample's key is
its path below the root without the suffix, '/'-separated, with the few characters escaped that
WebDataset or DALI would misread inside a tar. `unescape` turns it back.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from . import archives, listing, storage
from .listing import Classes, ListedFile, Listing

CLASSES_FILE = listing.CLASSES_FILE
IMAGE_SUFFIXES = listing.IMAGE_SUFFIXES

_MAX_NUMBERED_CLASSES = 10_000_000
_WNID = re.compile(r"n\d{8}")
_NUM_SHOWN = 10

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image that a source lists; nothing is read yet."""

    key: str
    """Path below the root without suffix, escaped; unique within the source."""
    file: str
    """The image's own file, or the archive that holds it, which all its samples share. A str:
    millions of Path objects would take gigabytes."""
    class_index: int | None
    """Index into the source's class_ids; None where a source has no classes."""
    offset: int | None = None
    """Where in the archive the image lies; None for a file of its own."""
    num_bytes: int | None = None
    """How much of the archive it takes; None for a file of its own."""


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Images with their keys and classes. May be shared between threads and sent to processes."""

    root: str
    """What the user gave: a folder, an archive, a pattern, a list."""
    samples: list[Sample]
    """Sorted by key as UTF-8 bytes: the same list on every machine."""
    class_ids: list[str]
    """Folder names (or what a list says), in the order of the class indices; empty for images
    without classes."""
    class_names: list[str]
    """What people read, one per class id."""

    @property
    def num_classes(self) -> int:
        """Number of classes, those without an image included; 0 for images without classes."""
        return len(self.class_ids)

    def read(self, sample: Sample) -> bytes:
        """Return the image's bytes as they are stored.

        Raises:
            FileNotFoundError: If the image's own file is gone. (PermissionError likewise.)
            OSError: If storage fails, or an archive is gone: no image can be expected to be read.
            BadImage: If it is damaged in a zip.
        """
        if sample.offset is None or sample.num_bytes is None:
            return Path(sample.file).read_bytes()
        return archives.read_member(sample.file, sample.offset, sample.num_bytes)


def open_source(
    images: Path | str, *, classes: Path | None = None, root: Path | str | None = None
) -> ImageSource:
    """List images, wherever they are.

    `images` is one of

    * a folder of class folders, ROOT/CLASS/**/NAME.jpg, or of images without classes;
    * a .tar or .zip (not compressed as a whole) of such a folder, or a tar of class tars, like
      ILSVRC2012_img_train.tar; ARCHIVE.tar/FOLDER takes a folder of it as the root;
    * WebDataset shards: a pattern with * or {000000..000012}, or one tar that holds .cls files;
    * a list, .txt, .tsv or .csv: a path and (or not) a class in each line, apart by a tab or comma.

    Archives may be URLs, see storage. Class indices follow the sorted class names, but in shards
    and in lists that hold nothing but numbers, those are the indices. `classes.txt` in the root
    (or `classes`) overrules the order: one class a line, CLASS or CLASS<TAB>display name, and the
    line number is the index. It may name classes that have no image here, so that a few photos
    can keep the indices of a thousand classes.

    Files with other suffixes and hidden files are left out and counted in the log.

    Args:
        images: See above.
        classes: A classes file elsewhere than in the root.
        root: Of a list: the folder or archive that its paths start from; None means its own folder.

    Raises:
        OSError: If something does not exist or cannot be read.
        ValueError: If there are no images, images beside class folders, classes that the classes
            file does not name, two images with one key, or an archive that is damaged.
    """
    given = None if classes is None else listing.read_classes(classes)
    found = _list(str(images), root, with_classes=classes is not None)
    if found.num_ignored:
        files = "file" if found.num_ignored == 1 else "files"
        suffixes = " ".join(IMAGE_SUFFIXES)
        _logger.info(
            "%s: left out %d %s, ending in none of %s", images, found.num_ignored, files, suffixes
        )
    class_ids, class_names, index_of = _resolve_classes(found, given)
    return ImageSource(str(images), _samples(found, index_of), class_ids, class_names)


def _list(name: str, root: Path | str | None, *, with_classes: bool) -> Listing:
    is_local = not storage.is_url(name)
    if is_local and Path(name).is_file() and name.lower().endswith(listing.LIST_SUFFIXES):
        return listing.list_file(Path(name), root)
    if root is not None:
        raise ValueError(f"--root {root} is for lists of images; {name} is its own root")
    if is_local and Path(name).is_dir():
        return listing.list_folder(name, with_classes=with_classes)
    return listing.list_archives(name, with_classes=with_classes)


def escape(path: str) -> str:
    """Turn a '/'-separated path without suffix into a key.

    WebDataset and DALI cut a name at the first dot behind the last '/', DALI's index separates
    its columns by blanks, its script doubles backslashes, and WebDataset skips names that begin
    with __word__. Such characters, and bytes that are no UTF-8, become %XX, as in a URL.
    """
    folder, slash, name = path.rpartition("/")
    key = _percent(folder, _KEY_UNSAFE) + slash + _percent(name, _NAME_UNSAFE)
    return "%5F" + key[1:] if listing.SKIPPED_BY_WEBDATASET.match(key) else key


def unescape(key: str) -> str:
    """Turn a key back into the path below the root, without suffix."""
    data = re.sub(rb"%([0-9A-F]{2})", lambda m: bytes([int(m[1], 16)]), key.encode())
    return os.fsdecode(data)


_KEY_UNSAFE = re.compile(r"[%\\\s\x00-\x20\x7f\ud800-\udfff]")
_NAME_UNSAFE = re.compile(r"[.%\\\s\x00-\x20\x7f\ud800-\udfff]")
_SHARD_KEY_UNSAFE = re.compile(r"%(?![0-9A-F]{2})|[\\\s\x00-\x20\x7f\ud800-\udfff]")


def _percent(text: str, unsafe: re.Pattern[str]) -> str:
    return unsafe.sub(lambda m: "".join(f"%{b:02X}" for b in os.fsencode(m[0])), text)


def _resolve_classes(
    found: Listing, given: Classes | None
) -> tuple[list[str], list[str], dict[str, int]]:
    """Return ids and names of the classes, and the index of each label."""
    if not found.labels:
        if given is not None:
            raise ValueError(
                f"{given.where} names classes, but {found.name} says of no image which class it has"
            )
        return [], [], {}
    classes = given or found.classes
    if found.is_numbered and not (classes and _are_names(found, classes)):
        return _numbered_classes(found, classes)
    if classes is None:
        classes = Classes("", found.labels, _display_names(found.labels))
    _check_labels_listed(found.labels, classes)
    return classes.ids, classes.names, {name: i for i, name in enumerate(classes.ids)}


def _are_names(found: Listing, classes: Classes) -> bool:
    """Tell whether a list's numbers are names of classes, like the folders of MNIST."""
    return not found.are_shards and set(found.labels) <= set(classes.ids)


def _numbered_classes(
    found: Listing, classes: Classes | None
) -> tuple[list[str], list[str], dict[str, int]]:
    index_of = {label: int(label) for label in found.labels}
    num_classes = max(index_of.values()) + 1
    if classes is None:
        if num_classes > _MAX_NUMBERED_CLASSES:
            raise ValueError(
                f"{found.name} has a class {num_classes - 1}; above {_MAX_NUMBERED_CLASSES} "
                "classes must be named in a --classes file"
            )
        ids = [str(number) for number in range(num_classes)]
        return ids, ids, index_of
    if num_classes > len(classes.ids):
        raise ValueError(
            f"{found.name} has a class {num_classes - 1}, but {classes.where} names "
            f"{len(classes.ids)} classes, 0 to {len(classes.ids) - 1}"
        )
    return classes.ids, classes.names, index_of


def _check_labels_listed(labels: list[str], classes: Classes) -> None:
    unlisted = sorted(set(labels).difference(classes.ids))
    if unlisted:
        shown = ", ".join(map(repr, unlisted[:_NUM_SHOWN]))
        raise ValueError(
            f"{classes.where} does not name {len(unlisted)} class folders: {shown}"
            f"{', …' if len(unlisted) > _NUM_SHOWN else ''}; it holds one class a line, FOLDER or "
            f"FOLDER<TAB>name (line 1 names {classes.ids[0]!r})"
        )


def _display_names(labels: list[str]) -> list[str]:
    if not all(map(_WNID.fullmatch, labels)):
        return labels
    from timm.data.imagenet_info import ImageNetInfo  # slow to import, and few folders need it

    info = ImageNetInfo()
    known = set(info.label_names())
    return [info.label_name_to_description(wnid) if wnid in known else wnid for wnid in labels]


def _samples(found: Listing, index_of: dict[str, int]) -> list[Sample]:
    file_of: dict[str, ListedFile] = {}
    for file in found.files:
        key = _key(file, found)
        other = file_of.setdefault(key, file)
        if other is not file:
            first, second = sorted((_described(other), _described(file)))
            raise ValueError(
                f"{first} and {second} in {found.name} would share the key {key!r}; "
                "rename or remove one of them"
            )
    return [
        Sample(
            key,
            file.file,
            None if file.label is None else index_of[file.label],
            file.offset,
            file.num_bytes,
        )
        for key, file in sorted(file_of.items())
    ]


def _key(file: ListedFile, found: Listing) -> str:
    if found.are_shards:
        return _percent(listing.shard_stem(file.path), _SHARD_KEY_UNSAFE)
    return escape(file.path.rpartition(".")[0])


def _described(file: ListedFile) -> str:
    return file.path if file.offset is None else f"{file.path} ({file.file}, offset {file.offset})"


ImageFolder = ImageSource
"""The older name."""
