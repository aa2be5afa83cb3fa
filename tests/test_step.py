"""Batches computed in parts: which images are together, and what is added up."""

from typing import Any

import pytest
import torch
from loop_runs import fixed_data, tiny_recipe
from torch import nn

from tokenlabel.trainer.mix_token import MixBox
from tokenlabel.trainer.mixup import PixelMix
from tokenlabel.trainer.models import create_model
from tokenlabel.trainer.optim import explain_lr
from tokenlabel.trainer.step import add_gradients, num_parts, rows_of_part, targets_of


@pytest.mark.parametrize(
    "num_images, most, parts",
    [
        (128, None, 1),
        (128, 128, 1),
        (128, 127, 2),
        (1024, 128, 8),
        (12, 5, 3),
        (7, 7, 1),
        (8, 2, 4),
    ],
)
def test_a_batch_is_cut_into_the_fewest_equal_parts_of_pairs(num_images, most, parts):
    assert num_parts(num_images, most) == parts


@pytest.mark.parametrize("num_images, most", [(7, 3), (9, 8)])
def test_batches_without_such_parts_are_refused_with_the_key(num_images, most):
    with pytest.raises(ValueError, match=f"run.device_batch_size = {most}: .* {num_images} images"):
        num_parts(num_images, most)


@pytest.mark.parametrize("num_images, parts", [(12, 3), (8, 1), (8, 2), (8, 4)])
def test_parts_hold_each_image_once_and_its_partner_in_the_mirrored_place(num_images, parts):
    each = [rows_of_part(part, num_images, parts) for part in range(parts)]
    assert torch.cat(each).sort().values.tolist() == list(range(num_images))
    for rows in each:
        assert (rows + rows.flip(0)).tolist() == [num_images - 1] * len(rows)


MIXES = [
    None,
    MixBox(1, 0, 3, 2, (4, 4)),
    PixelMix(box=MixBox(0, 0, 64, 64, (64, 64)), kept_inside=0.3, tokens=(4, 4)),
    PixelMix(box=MixBox(5, 7, 30, 64, (64, 64)), kept_inside=0.0, tokens=(4, 4)),
]


def gradients(
    parts: int, *, mix: MixBox | PixelMix | None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    recipe = tiny_recipe("model.drop_path=0", "labels.dense_weight=0.5")
    torch.manual_seed(0)
    model: Any = create_model(recipe.model)
    nn.init.normal_(model.aux_head.weight)
    model.train()
    model.patch_embed.eval()
    batch = next(fixed_data(rows=list(range(8))).open_train(None, 0))
    targets = targets_of(batch, recipe, model.grid)
    targets.token_weight[:3, 2:] = 0  # the first images have few tokens that are taught
    loss = add_gradients(model, batch, targets, mix, recipe, parts=parts, bf16=False)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [value.item() for value in loss], found


@pytest.mark.parametrize("mix", MIXES, ids=["none", "mix_token", "mixup", "cutmix"])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_add_up_to_the_gradients_of_the_whole_batch(parts, mix):
    whole_loss, whole = gradients(1, mix=mix)
    loss, found = gradients(parts, mix=mix)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert found.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_line_about_the_learning_rate_says_what_the_batch_is_made_of():
    config = tiny_recipe("optim.batch_size=64", "optim.lr_batch_size=128", "optim.lr=1e-3").optim
    text = explain_lr(config, num_processes=2, num_parts=4)
    assert text.startswith("peak learning rate 0.0005 = optim.lr 0.001 × batch 64 / 128: ")
    assert text.endswith("; 64 = 2 processes × 4 parts × 8 images")
    assert "=" not in explain_lr(tiny_recipe().optim)
