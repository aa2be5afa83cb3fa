"""Weights that the authors of our models published: by name, by URL, or from a file."""

import logging
from pathlib import Path
from urllib.parse import urlsplit

import timm
import torch

from .distributed import Place, from_main
from .models import MODELS
from .recipe import nearest

log = logging.getLogger(__name__)


def published_urls() -> dict[str, str]:
    """Map NAME_SIDE (lvvit_s_224) and timm's NAME.TAG to the addresses of published weights."""
    urls = {}
    for name in timm.list_pretrained():
        config = timm.get_pretrained_cfg(name)
        architecture = name.partition(".")[0]
        if architecture in MODELS and config is not None and config.url:
            urls[name] = config.url
            # The first tag of a size is the model's own; others need their tag to be named.
            urls.setdefault(f"{architecture}_{config.input_size[-1]}", config.url)
    return urls


def fetch(name: str, place: Place) -> Path:
    """Find a checkpoint as `find_weights` does, the main process first: it alone downloads."""
    if place.is_main:
        find_weights(name)
    from_main(place, None)  # the others wait; on other machines they download for themselves then
    return find_weights(name)


def find_weights(name: str) -> Path:
    """Find a checkpoint file, downloading it into torch's cache where it is not there yet.

    Args:
        name: A file's path, an http or https address, or a key of `published_urls`.

    Raises:
        ValueError: No such file and no such name; the closest are in the message.
        OSError: The download failed.
    """
    if Path(name).exists():
        return Path(name)
    if urlsplit(name).scheme in ("http", "https"):
        return _download(name)
    urls = published_urls()
    if name in urls:
        return _download(urls[name])
    if "/" in name or Path(name).suffix in (".pt", ".pth", ".tar", ".safetensors"):
        raise FileNotFoundError(f"checkpoint {name} does not exist")
    short = [key for key in urls if "." not in key]
    near = nearest(name, urls if "." in name else short, most=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    known = ", ".join(short)
    raise ValueError(
        f"{name} is neither a file nor the name of published weights{hint}; known: {known}"
    )


def _download(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
    if path.exists():
        log.info("%s was downloaded before: %s", url, path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("downloading %s to %s", url, path)
    try:
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:
        raise OSError(
            f"{url} could not be downloaded ({error}); if this machine has no network, download it "
            "elsewhere and give the file"
        ) from error
    return path
