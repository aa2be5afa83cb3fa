"""Checkpoints for other programs read back there as they were here; published ones are fetched."""

import argparse
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner
from loop_runs import fixed_data, tiny_recipe

from tokenlabel import cli
from tokenlabel.trainer import published, run_log
from tokenlabel.trainer.checkpoint import Checkpoint, load_model, load_weights, save
from tokenlabel.trainer.distributed import Place
from tokenlabel.trainer.export import export
from tokenlabel.trainer.loop import fit
from tokenlabel.trainer.models import create_model
from tokenlabel.trainer.models.lvvit import resize_pos_embed
from tokenlabel.trainer.published import find_weights, published_urls
from tokenlabel.trainer.recipe import ModelConfig, parse_recipe, to_toml

LVVIT = '[model]\nname = "lvvit_t"\nnum_classes = 3\nimage_size = 32\n'
SMALL = LVVIT + "kwargs = { embed_dim = 16, depth = 1, num_heads = 2, stem_width = 4 }\n"


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """One thread, as the tensors are tiny; no pictures, as they would take most of the time."""
    torch.set_num_threads(1)
    monkeypatch.setattr(run_log, "draw_curves", lambda *_: None)


def checkpoint(folder: Path, text: str) -> Path:
    torch.manual_seed(0)
    recipe = parse_recipe(text)
    model = create_model(recipe.model)
    content = Checkpoint(
        recipe=to_toml(recipe), class_ids=["n1", "n2", "n3"], class_names=["cat", "dog", "emu"],
        grid=model.grid, step=1, model=model.state_dict(),
    )  # fmt: skip
    save(content, folder / "a.pt")
    return folder / "a.pt"


def of_timm(name: str) -> str:
    return (
        f'[model]\nname = "{name}"\nnum_classes = 3\nimage_size = 64\ndrop_path = 0.0\n'
        "[augment]\nmean = [0.1, 0.2, 0.3]\n[evaluation]\ncrop_pct = 0.8\n"
    )


@pytest.mark.parametrize("text", [SMALL, of_timm("test_resnet"), of_timm("test_vit")])
def test_timm_alone_builds_what_was_exported_and_it_answers_the_same(tmp_path, text):
    path = checkpoint(tmp_path, text)
    done = CliRunner().invoke(cli.train, ["export", str(path), "--out", str(tmp_path / "out")])
    assert (done.exit_code, len(done.output.splitlines())) == (0, 2), done.output
    ours = load_model(path).model.eval()
    theirs: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    side = parse_recipe(text).model.image_hw[0]
    images = torch.randn(2, 3, side, side)
    torch.testing.assert_close(theirs(images), ours(images))
    config, recipe = theirs.pretrained_cfg, parse_recipe(text)
    assert tuple(config["mean"]) == recipe.augment.mean
    assert config["crop_pct"] == recipe.evaluation.crop_pct
    assert tuple(config["input_size"]) == (3, side, side)
    assert list(config["label_names"]) == ["n1", "n2", "n3"]
    assert config["label_descriptions"]["n2"] == "dog"


def test_a_program_that_has_timm_alone_loads_what_was_exported(tmp_path):
    names = ["test_resnet", "test_vit", "test_convnext"]
    images = torch.randn(2, 3, 64, 64)
    torch.save(images, tmp_path / "images.pt")
    expected = []
    for name in names:
        (tmp_path / f"of {name}").mkdir()
        path = checkpoint(tmp_path / f"of {name}", of_timm(name))
        export(path, tmp_path / name)
        expected.append(load_model(path).model.eval()(images))
    program = (
        "import sys, timm, torch; folder, *names = sys.argv[1:]\n"
        "models = [timm.create_model(f'local-dir:{folder}/{n}', pretrained=True) for n in names]\n"
        "images = torch.load(f'{folder}/images.pt')\n"
        "torch.save([model.eval()(images) for model in models], f'{folder}/logits.pt')\n"
        "assert not any(name.partition('.')[0] == 'tokenlabel' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path), *names], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


def test_timm_loads_the_weights_by_checkpoint_path_too(tmp_path):
    weights, config = export(checkpoint(tmp_path, of_timm("test_resnet")), tmp_path / "out")
    assert (weights.name, config.name) == ("model.safetensors", "config.json")
    model = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(weights))
    found = safetensors.torch.load_file(weights)
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_the_published_form_loads_as_a_published_file(tmp_path):
    path = checkpoint(tmp_path, LVVIT)
    (file,) = export(path, tmp_path / "out", form="published")
    assert set(torch.load(file, weights_only=True)) == {"state_dict"}
    found, source = load_model(file), load_model(path)
    assert (found.name, found.report.weights) == ("lvvit_t", "published")
    for name, value in source.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name
    with pytest.raises(ValueError, match="is not of tl-train, and so in its published form"):
        export(file, tmp_path / "twice")


def test_what_cannot_be_exported_says_why(tmp_path):
    path = checkpoint(tmp_path, of_timm("test_resnet"))
    with pytest.raises(ValueError, match="published is for LV-ViT .* holds test_resnet"):
        export(path, tmp_path / "out", form="published")
    with pytest.raises(ValueError, match="holds no averaged weights"):
        export(path, tmp_path / "out", ema=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="is not empty; choose another --out"):
        export(path, tmp_path)


# --------------------------------------------------------------------------- published weights


class Quiet(SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a server of tmp_path/site; torch's cache is in tmp_path."""
    (tmp_path / "site").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    Quiet.asked.clear()
    handler = partial(Quiet, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


def test_every_published_file_has_a_name():
    urls = published_urls()
    assert urls["lvvit_s_224"] == urls["lvvit_s.in1k"]
    assert urls["lvvit_s_224"].endswith("/1.0/lvvit_s-26M-224-83.3.pth.tar")
    sides = {"lvvit_t": [224], "lvvit_s": [224, 384], "lvvit_m": [224, 384, 448]}
    sides |= {"lvvit_l": [448, 512], "t2t_vit_14": [224, 384]}
    assert {f"{name}_{side}" for name, all_of in sides.items() for side in all_of} <= set(urls)
    assert urls["t2t_vit_24_224"].endswith("82.3_T2T_ViT_24.pth.tar")


PUBLISHED = {
    "lvvit_t_224": "lvvit_t.pth",
    "lvvit_s_224": "lvvit_s-26M-224-83.3.pth.tar",
    "lvvit_s_384": "lvvit_s-26M-384-84.4.pth.tar",
    "lvvit_m_224": "lvvit_m-56M-224-84.0.pth.tar",
    "lvvit_m_384": "lvvit_m-56M-384-85.4.pth.tar",
    "lvvit_m_448": "lvvit_m-56M-448-85.5.pth.tar",
    "lvvit_l_448": "lvvit_l-150M-448-86.2.pth.tar",
    "lvvit_l_512": "lvvit_l-150M-512-86.4.pth.tar",
}
"""The files that the authors of LV-ViT list, and the names that we give them."""


def hollow(name: str, side_px: int) -> dict[str, torch.Tensor]:
    """Weights of the published names and shapes that hold, and take, almost nothing."""
    with torch.device("meta"):
        wanted = timm.create_model(name, img_size=side_px).state_dict()
    return {key: torch.zeros((), dtype=v.dtype).expand(v.shape) for key, v in wanted.items()}


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize("short", PUBLISHED)
def test_each_published_file_is_fetched_by_its_name_and_loads_at_any_size(
    server, tmp_path, monkeypatch, short
):
    real = published_urls()[short]
    assert real.startswith("https://github.com/zihangJiang/TokenLabeling/releases/download/")
    assert real.endswith(f"/{PUBLISHED[short]}")
    name, side_px = short[:7], int(short[8:])
    weights: dict[str, Any] = hollow(name, side_px)
    if side_px != 224:  # bare or nested, with and without DistributedDataParallel's prefix
        weights = {"state_dict": {f"module.{key}": v for key, v in weights.items()}}
    torch.save(weights, tmp_path / "site" / PUBLISHED[short])
    urls = {short: f"{server}/{PUBLISHED[short]}"}
    monkeypatch.setattr(published, "published_urls", lambda: urls)
    path = find_weights(short)
    with torch.device("meta"):
        found = load_model(path)
        assert (found.name, found.model.grid) == (name, (side_px // 16, side_px // 16))
        assert str(found.report) == f"{path}: published weights loaded; all fit"
        other = create_model(ModelConfig(name=name, num_classes=7, image_size=side_px + 64))
        report = load_weights(other, path, new_heads=True)
    assert str(report) == (
        f"{path}: published weights loaded; pos_embed resized; head.weight, head.bias, "
        "aux_head.weight, aux_head.bias dropped (other class count)"
    )


def test_a_file_of_lvvit_s_at_full_size_loads_raw_and_averaged_weights_into_another_model(tmp_path):
    torch.manual_seed(0)
    raw = timm.create_model("lvvit_s").state_dict()
    averaged = {name: value / 2 for name, value in raw.items()}
    content = {
        "epoch": 309,
        "arch": "lvvit_s",
        "args": argparse.Namespace(model="lvvit_s", lr=1.6e-3, mean=None),
        "metric": 83.3,
        "version": 2,
        "state_dict": {f"module.{name}": value for name, value in raw.items()},
        "state_dict_ema": averaged,
    }  # as timm's training script writes it, which the authors of LV-ViT used
    torch.save(content, tmp_path / "model_best.pth.tar")
    model = create_model(ModelConfig(name="lvvit_s", num_classes=10, image_size=384))
    head = model.state_dict()["head.weight"].clone()
    for ema, source in [(None, averaged), (False, raw)]:
        report = load_weights(model, tmp_path / "model_best.pth.tar", ema=ema, new_heads=True)
        assert "; pos_embed resized; head.weight, " in str(report)
        found = model.state_dict()
        assert torch.equal(found["pos_embed"], resize_pos_embed(source["pos_embed"], (24, 24)))
        assert torch.equal(found["head.weight"], head)
        same = [name for name in raw if "head" not in name and name != "pos_embed"]
        assert all(torch.equal(found[name], source[name]) for name in same)


def test_a_run_begins_with_weights_that_are_fetched_by_name_once(server, tmp_path, monkeypatch):
    recipe = tiny_recipe("optim.lr=1e-12", "schedule.duration=1 steps", "schedule.warmup=0 steps",
                         "schedule.cooldown=0 steps", "schedule.min_lr=0")  # fmt: skip
    torch.manual_seed(9)
    source = create_model(recipe.model).state_dict()
    torch.save({"state_dict": source}, tmp_path / "site" / "s.pth.tar")
    urls = {"lvvit_s_224": f"{server}/s.pth.tar"}
    monkeypatch.setattr(published, "published_urls", lambda: urls)
    place = Place(device=torch.device("cpu"))
    for name in ("one", "two"):
        fit(recipe, fixed_data(), tmp_path / name, place, init="lvvit_s_224")
        found = load_model(tmp_path / name / "checkpoints" / "last.pt", ema=False).model
        expected = source["pos_embed"]
        torch.testing.assert_close(found.state_dict()["pos_embed"], expected, rtol=0, atol=1e-6)
    assert Quiet.asked == ["/s.pth.tar"]


def test_urls_and_files_are_found_and_the_rest_is_refused(server, tmp_path):
    torch.manual_seed(0)
    model = create_model(parse_recipe(SMALL).model)
    torch.save(model.state_dict(), tmp_path / "site" / "w.pth")
    fetched = find_weights(f"{server}/w.pth")
    assert fetched == tmp_path / "cache" / "hub" / "checkpoints" / "w.pth"
    assert load_weights(create_model(parse_recipe(SMALL).model), fetched).weights == "published"
    assert find_weights(str(fetched)) == fetched
    with pytest.raises(OSError, match="no.pth could not be downloaded .*404.*; if this machine"):
        find_weights(f"{server}/no.pth")
    assert [path.name for path in fetched.parent.iterdir()] == ["w.pth"]
    with pytest.raises(FileNotFoundError, match="checkpoint run/best.pt does not exist"):
        find_weights("run/best.pt")
    with pytest.raises(ValueError, match="lvvit_s_225 is neither .*; did you mean lvvit_s_224 or "):
        find_weights("lvvit_s_225")
    with pytest.raises(ValueError, match="did you mean lvvit_s_224 or lvvit_s_384[?;]"):
        find_weights("lvvit_s")
