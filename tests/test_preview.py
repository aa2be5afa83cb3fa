"""What the sheet of crops shows: mixed targets are those of the loss, pixels those of the feed."""

import pytest
import torch
from click.testing import CliRunner
from loop_runs import fixed_data, tiny_recipe, write_data
from PIL import Image

from tokenlabel.cli import train as tl_train
from tokenlabel.trainer.loss import token_label_loss
from tokenlabel.trainer.mix_token import MixBox, mix
from tokenlabel.trainer.preview import draw_crops, mix_targets, write_preview
from tokenlabel.trainer.recipe import to_toml
from tokenlabel.trainer.step import targets_of

GRID = (4, 4)
NAMES = [f"class {i}" for i in range(40)]
BOX = MixBox(0, 1, 3, 3, GRID)


def flipped(targets):
    tensors = {n: v.flip(0) for n, v in vars(targets).items() if isinstance(v, torch.Tensor)}
    return type(targets)(**tensors, num_classes=targets.num_classes)


def test_mixed_targets_are_what_the_loss_compares_with_mixed_logits():
    batch = next(fixed_data().open_train(None, 0))
    recipe = tiny_recipe()
    targets = targets_of(batch, recipe, GRID)
    generator = torch.Generator().manual_seed(0)
    class_logits = torch.randn(4, 40, generator=generator)
    aux_logits = torch.randn(4, 16, 40, generator=generator)
    expected = token_label_loss(class_logits, aux_logits, targets, box=BOX)
    mixed = mix_targets(targets, flipped(targets), BOX)
    swapped = mix(aux_logits, BOX.mask(torch.device("cpu")))
    found = token_label_loss(class_logits, swapped, mixed)
    assert [v.item() for v in found] == pytest.approx([v.item() for v in expected], rel=1e-5)
    torch.testing.assert_close(mixed.dense_tokens().sum(2), torch.ones(4, 16))


def test_the_sheet_shows_the_pixels_with_the_box_of_the_partner():
    batch = next(fixed_data().open_train(None, 0))
    batch.images[:] = torch.tensor([-2.0, -1.0, 1.0, 2.0])[:, None, None, None]
    recipe = tiny_recipe("augment.mean=[0.5,0.5,0.5]", "augment.std=[0.2,0.2,0.2]")
    plain = draw_crops(batch, recipe, GRID, NAMES, box=None, most=1)
    mixed = draw_crops(batch, recipe, GRID, NAMES, box=BOX, most=1)
    own, partner = round(255 * (0.5 - 2 * 0.2)), round(255 * (0.5 + 2 * 0.2))
    inside, outside = (12 + 160, 39 + 120), (12 + 40, 39 + 280)  # the crop is 320 px from (12, 39)
    assert (plain.getpixel(inside), plain.getpixel(outside)) == ((own,) * 3, (own,) * 3)
    assert (mixed.getpixel(inside), mixed.getpixel(outside)) == ((partner,) * 3, (own,) * 3)


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
