"""Where curves are watched while a run goes on: TensorBoard, and Weights & Biases on request."""

import importlib
import threading
import tomllib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

WANDB_FOLDER = "wandb"
"""Which the wandb package makes in the folder that it is given."""
WANDB_ID = "wandb-id.txt"


@runtime_checkable
class Dashboard(Protocol):
    """What RunLog asks of a place that shows curves."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers, each under a name like train/loss."""
        ...

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Show a picture."""
        ...

    def close(self, *, failed: bool) -> None:
        """Flush everything; `failed` where an error ends the run."""
        ...


class TensorBoard:
    """Event files in a folder.

    Args:
        folder: Of the event files.
        step: Steps already taken; what earlier starts of the run said of later ones is hidden.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        # It writes in a thread, and passes the thread's errors on to the next call: a full disk
        # needs no traceback besides.
        self._excepthook, threading.excepthook = threading.excepthook, self._on_thread_error
        self._events = SummaryWriter(folder, purge_step=step + 1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Add an image."""
        pixels = np.asarray(picture.convert("RGB"))
        self._events.add_image(name, pixels, step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        """Flush everything."""
        del failed
        try:
            self._events.close()
        finally:
            threading.excepthook = self._excepthook

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        if not (type(error.thread).__module__.startswith("tensorboard.")):
            self._excepthook(error)


class Wandb:
    """A run on a server of Weights & Biases, the same one at each start.

    Args:
        run_folder: Holds wandb's own files and the run's id.
        project: On the server.
        recipe: Resolved, as TOML; shown as the run's configuration.

    Raises:
        ValueError: The package is not installed, or the server cannot be used.
    """

    def __init__(self, run_folder: Path, *, project: str, recipe: str) -> None:
        self._wandb = import_wandb()
        id_file = run_folder / WANDB_ID
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        try:
            self._run = self._wandb.init(
                project=project,
                name=run_folder.resolve().name,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(run_folder),
                config=tomllib.loads(recipe),
            )
        except self._wandb.Error as error:
            why = str(error).rstrip(". ")
            raise ValueError(
                f"--wandb cannot begin: {why}. Leave --wandb out, or set WANDB_MODE=offline and "
                "send the run later with wandb sync"
            ) from error
        # An axis of our own: wandb's refuses steps that it has seen, which a killed run repeats.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at a step."""
        self._run.log({"step": step, **values})

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Log an image at a step."""
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def close(self, *, failed: bool) -> None:
        """Send what is left, and tell whether the run went well."""
        self._run.finish(exit_code=int(failed))


def import_wandb() -> Any:
    """Import wandb, an optional extra.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            "--wandb needs the package wandb, which is not installed: "
            "pip install 'tokenlabel[wandb]'"
        ) from error
