"""The same photos, offered in every way that a source may come; and a web server to offer them."""

import csv
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from tokenlabel.labeler.sources import open_source

CLASSES = ["001.Black footed", "dög", "n01440764"]


def fill_with_photos(root: Path, *, num_images: int = 30) -> Path:
    """Write small photos into three class folders, with names that are easily misread."""
    rng = np.random.default_rng(0)
    for number in range(num_images):
        name = ["x {}.a.jpg", "{}.JPEG", "deep/{}.png"][number % 5 % 3].format(number)
        path = root / CLASSES[number % 3] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (24 + number % 4, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def tar_of(members: dict[str, bytes], *, format: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a tar; names that end in '/' become folders."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def images_of(root: Path) -> dict[str, bytes]:
    """Return all images below a folder, by path, in no particular order."""
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in reversed(paths)}


def shards_of(root: Path, *, num_shards: int = 4) -> list[bytes]:
    """Return WebDataset shards of class folders, the samples dealt out to them like cards."""
    source = open_source(root)
    shards: list[dict[str, bytes]] = [{} for _ in range(num_shards)]
    for i, sample in enumerate(source.samples):
        suffix = sample.file.rpartition(".")[2]
        shards[i % num_shards] |= {
            f"{sample.key}.json": b'{"a": "field that nobody reads"}',
            f"{sample.key}.{suffix}": source.read(sample),
            f"{sample.key}.cls": f"{sample.class_index}\n".encode(),
        }
    return [tar_of(shard) for shard in shards]


def offer(root: Path, folder: Path) -> dict[str, str]:
    """Write the images of class folders in many other ways.

    Returns:
        What to give as images, by the name of the way.
    """
    folder.mkdir()
    images = images_of(root)
    write = {name: folder / name for name in ("plain.tar", "outer.tar", "train.tar", "photos.zip")}
    write["plain.tar"].write_bytes(tar_of({f"./{path}": data for path, data in images.items()}))
    write["outer.tar"].write_bytes(
        tar_of(
            {"my/": b"", "my/photos/": b""}
            | {f"my/photos/{p}": data for p, data in images.items()},
            format=tarfile.PAX_FORMAT,
        )
    )
    class_tars = {
        f"{name}.tar": tar_of(
            {p.removeprefix(f"{name}/"): data for p, data in images.items() if p.startswith(name)}
        )
        for name in reversed(CLASSES)
    }
    write["train.tar"].write_bytes(tar_of(class_tars))
    with zipfile.ZipFile(write["photos.zip"], "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in images.items():
            archive.writestr(path, data, zipfile.ZIP_DEFLATED if path[-1] == "g" else None)
    for i, shard in enumerate(shards_of(root)):
        (folder / f"shard-{i:06d}.tar").write_bytes(shard)
    rows = [(path, path.partition("/")[0]) for path in images]
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "class"), *rows])
    (root.parent / "list.tsv").write_text("".join(f"{root.name}/{p}\t{c}\n" for p, c in rows))
    return {
        "tar": str(write["plain.tar"]),
        "tar from outside": str(write["outer.tar"]),
        "folder in a tar": f"{write['outer.tar']}/my/photos",
        "tar of class tars": str(write["train.tar"]),
        "zip": str(write["photos.zip"]),
        "braces": f"{folder}/shard-{{000000..000003}}.tar",
        "glob": f"{folder}/shard-*.tar",
        "list": str(folder / "list.csv"),
    }


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        if server.num_failures:
            server.num_failures -= 1
            self.send_error(503)
            return
        path = server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        start, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not (server.has_ranges and start):
            self._answer(200, data, {})
        elif int(start) >= len(data):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        else:
            part = data[int(start) : int(last) + 1]
            stop = int(start) + len(part)
            self._answer(206, part, {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    folder: Path
    has_ranges: bool
    num_failures = 0
    """Requests to be answered with an error before the next good one."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def web_server(folder: Path, *, has_ranges: bool = True) -> Iterator[_Server]:
    """Serve the files of a folder on this machine."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.folder, server.has_ranges = folder, has_ranges
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
