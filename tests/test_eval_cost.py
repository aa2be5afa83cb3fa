"""What a model costs: operations counted by hand, and what papers say."""

import json

import pytest
import timm
import torch
from click.testing import CliRunner
from shard_sets import jpeg, painted
from torch import nn

import tokenlabel.trainer.models  # noqa: F401  (registers ours)
from tokenlabel.cli import evaluate as tl_eval
from tokenlabel.evaluator.cost import count_flops, measure_cost
from tokenlabel.evaluator.data import EvalView
from tokenlabel.evaluator.models import EvalModel
from tokenlabel.trainer.models.lvvit import lvvit_t

CPU = torch.device("cpu")


def test_operations_of_layers_are_those_counted_by_hand():
    convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    model = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5)).eval()
    by_hand = 2 * (4 * 4 * 8 * 3 * 3 * 3) + 2 * (8 * 4 * 4 * 5)
    assert count_flops(model, torch.zeros(1, 3, 8, 8)) == by_hand


def test_attention_is_counted_whatever_kernel_computes_it():
    depth, width, heads, tokens = 2, 24, 2, 1 + 4
    model = lvvit_t(
        img_size=32, num_classes=7, depth=depth, embed_dim=width, num_heads=heads, stem_width=8
    ).eval()
    mlp = model.blocks[0].mlp.fc1.out_features  # pyright: ignore
    block = tokens * width * (3 * width + width + 2 * mlp) + 2 * tokens**2 * width
    convolutions = 0
    side = 16
    for conv in [m for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d)]:
        side = 16 if conv.kernel_size != (8, 8) else 2
        per_pixel = conv.weight[0].numel() * conv.out_channels
        convolutions += side * side * per_pixel
    if isinstance(getattr(model.patch_embed, "proj", None), nn.Linear):
        convolutions += 4 * model.patch_embed.proj.weight.numel()  # pyright: ignore
    heads_ = width * 7 + (tokens - 1) * width * 7
    assert count_flops(model, torch.zeros(1, 3, 32, 32)) == 2 * (
        depth * block + convolutions + heads_
    )


@pytest.mark.parametrize(("name", "gmacs"), [("lvvit_s", 6.6), ("deit_small_patch16_224", 4.6)])
def test_counts_are_those_of_the_papers(name, gmacs):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        flops = count_flops(model, torch.zeros(1, 3, 224, 224))
    assert flops / 2e9 == pytest.approx(gmacs, abs=0.06)


def test_speed_and_memory_are_measured():
    model = timm.create_model("test_resnet", num_classes=7)
    view = EvalView(
        image_size=(32, 40),
        crop_pct=1.0,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    loaded = EvalModel(
        model=model, name="m", weights="raw", view=view, num_classes=7, class_ids=None
    )
    found = measure_cost(loaded, device=CPU, batch_size=3, min_secs=0)
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert found.flops == 2 * found.macs == count_flops(model, torch.zeros(1, 3, 32, 40))
    assert found.images_per_sec > 0 and (found.batch_size, found.image_size) == (3, (32, 40))
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert held < found.peak_memory_bytes < 1 << 40
    assert found.device == "CPU" and found.num_threads == torch.get_num_threads()
    json.dumps(found.to_json())


def test_the_command_prints_the_cost(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(painted(40, 50)))
    model = timm.create_model("test_resnet", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "resnet.pt")
    arguments = ["--checkpoint", tmp_path / "resnet.pt", "--model", "test_resnet", "--cost"]
    arguments += ["--data", tmp_path / "photos", "--predict", tmp_path / "x.json"]
    arguments += ["--image-size", 32, "--workers", 1, "--batch-size", 2]
    done = CliRunner().invoke(tl_eval, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert f"cost      {millions:.2f} M parameters, " in done.stdout
    assert "images/s without reading (CPU, fp32, batch 2)" in done.stdout
    assert " GB at most" in done.stdout
