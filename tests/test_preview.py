"""What the sheet of crops shows: mixed targets are those of the loss, pixels those of the feed."""

import pytest
import torch
from click.testing import CliRunner
from loop_runs import fixed_data, tiny_recipe, write_data
from PIL import Image

from tokenlabel.cli import train as tl_train
from tokenlabel.trainer import preview
from tokenlabel.trainer.loss import token_label_loss
from tokenlabel.trainer.mix_token import MixBox, mix
from tokenlabel.trainer.mixup import PixelMix
from tokenlabel.trainer.preview import draw_crops, write_preview
from tokenlabel.trainer.recipe import to_toml
from tokenlabel.trainer.step import targets_of
from tokenlabel.trainer.targets import blend_targets, pick

GRID = (4, 4)
NAMES = [f"class {i}" for i in range(40)]
BOX = MixBox(0, 1, 3, 3, GRID)
HALF = PixelMix(box=MixBox(0, 0, 64, 64, (64, 64)), kept_inside=0.75, tokens=GRID)
CUT = PixelMix(box=MixBox(0, 16, 48, 48, (64, 64)), kept_inside=0.0, tokens=GRID)


def test_mixed_targets_are_what_the_loss_compares_with_mixed_logits():
    batch = next(fixed_data().open_train(None, 0))
    recipe = tiny_recipe()
    targets = targets_of(batch, recipe, GRID)
    generator = torch.Generator().manual_seed(0)
    class_logits = torch.randn(4, 40, generator=generator)
    aux_logits = torch.randn(4, 16, 40, generator=generator)
    expected = token_label_loss(class_logits, aux_logits, targets, box=BOX)
    mask = BOX.mask(torch.device("cpu"))
    partners = pick(targets, torch.tensor([3, 2, 1, 0]))
    mixed = blend_targets(targets, partners, kept_by_tokens=1 - mask.float(), kept=BOX.kept)
    swapped = mix(aux_logits, mask)
    found = token_label_loss(class_logits, swapped, mixed)
    assert [v.item() for v in found] == pytest.approx([v.item() for v in expected], rel=1e-5)
    torch.testing.assert_close(mixed.dense_tokens().sum(2), torch.ones(4, 16))


@pytest.mark.parametrize(
    ("mix", "own_inside", "own_outside", "share"),
    [(None, 1, 1, ""), (BOX, 0, 1, "38%"), (CUT, 0, 1, "38%"), (HALF, 0.75, 0.75, "25%")],
)
def test_the_sheet_shows_the_pixels_and_targets_of_both_images(
    monkeypatch, mix, own_inside, own_outside, share
):
    drawn, said = [], []
    draw, write = preview.draw_token_targets, preview._text
    monkeypatch.setattr(
        preview, "draw_token_targets", lambda *a, **k: (drawn.append(a), draw(*a, **k))[1]
    )
    monkeypatch.setattr(preview, "_text", lambda line: (said.append(line), write(line))[1])
    batch = next(fixed_data().open_train(None, 0))
    batch.images[:] = torch.tensor([-2.0, -1.0, 1.0, 2.0])[:, None, None, None]
    recipe = tiny_recipe("augment.mean=[0.5,0.5,0.5]", "augment.std=[0.2,0.2,0.2]")
    sheet = draw_crops(batch, recipe, GRID, NAMES, mix=mix, most=1)
    # The crop is 320 px from (12, 39), and its partner the last of the batch.
    for place, own in (((12 + 160, 39 + 120), own_inside), ((12 + 40, 39 + 280), own_outside)):
        value = round(255 * (0.5 + 0.2 * (-2 * own + 2 * (1 - own))))
        assert sheet.getpixel(place) == (value,) * 3
    assert (f"mixed with {share} of image 0.3" in said) == bool(mix)

    # In the box, and outside: what is drawn beside the pixels is what the two teach in their parts.
    targets = targets_of(batch, recipe, GRID).dense_tokens()
    shown = drawn[0][1].dense_tokens()[0]
    for token, own in ((5, own_inside), (12, own_outside)):
        expected = own * targets[0, token] + (1 - own) * targets[3, token]
        torch.testing.assert_close(shown[token], expected)


@pytest.mark.parametrize("overrides", [(), ("labels.dense_weight=0", "labels.class_target=label")])
def test_the_command_writes_a_sheet_of_as_many_crops_as_asked_for(tmp_path, overrides):
    write_data(tmp_path / "data")
    (tmp_path / "recipe.toml").write_text(to_toml(tiny_recipe("model.num_classes=0", *overrides)))
    sizes = []
    for count in (1, 4):
        out = tmp_path / "new" / f"{count}.png"
        arguments = ["preview", "--recipe", str(tmp_path / "recipe.toml"), "--out", str(out)]
        arguments += ["--data", str(tmp_path / "data"), "--count", str(count)]
        done = CliRunner().invoke(tl_train, arguments)
        assert done.exit_code == 0, done.output
        with Image.open(out) as sheet:
            sizes.append(sheet.size)
    assert sizes[1][0] >= 1.5 * sizes[0][0]
    assert sizes[1][1] >= 1.5 * sizes[0][1]


def test_a_sheet_of_no_crops_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--count 0: .* at least 1"):
        write_preview(tiny_recipe(), tmp_path, tmp_path / "a.png", num_crops=0)
