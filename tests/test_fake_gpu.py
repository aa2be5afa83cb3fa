"""What would run on a GPU, checked without one.

Under torch's FakeTensorMode tensors say that they lie on a GPU and hold no numbers. An operation
fails there, too, where one tensor was left on the CPU, and where Python asks for a number that is
on the GPU. Gradients need a driver, so the backward pass of models is left out. The kernel of the
loss is compiled for a GPU, and DALI's graph of the GPU feed is run with all its operators on the
CPU, as far as a GPU has them, too.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import random_map
from loop_runs import fixed_data, tiny_recipe
from nvidia.dali import backend
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from shard_sets import make_samples, write_split
from test_upernet import TINY as TINY_SEGMENTER
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenlabel.explainer.methods import METHODS, Options, explain
from tokenlabel.labeler import teacher as teacher_module
from tokenlabel.labeler.classes import LabelSpace
from tokenlabel.labeler.geometry import PaletteMaps, crop_view
from tokenlabel.labeler.score import reduce_to_top_k, tiled_cells
from tokenlabel.labeler.teacher import as_teacher
from tokenlabel.segmenter.inference import InferenceConfig, segment
from tokenlabel.segmenter.loss import seg_loss
from tokenlabel.segmenter.uper_net import ModelConfig as SegModelConfig
from tokenlabel.segmenter.uper_net import create_model as create_segmenter
from tokenlabel.shards.index import ShardIndex
from tokenlabel.trainer import feed as feed_module
from tokenlabel.trainer import loss as loss_module
from tokenlabel.trainer.augment_draws import Layers, Operation
from tokenlabel.trainer.distributed import Place, join_processes
from tokenlabel.trainer.evaluate import evaluate
from tokenlabel.trainer.feed import Batch, EvalFeed, TrainFeed, normalize
from tokenlabel.trainer.mix_token import MixBox
from tokenlabel.trainer.mixup import PixelMix
from tokenlabel.trainer.models import create_model
from tokenlabel.trainer.optim import Ema, make_optimizer, skip_if
from tokenlabel.trainer.rand_augment import apply_layers
from tokenlabel.trainer.recipe import AugmentConfig
from tokenlabel.trainer.step import add_gradients, batch_statistics, restore_if, targets_of
from tokenlabel.trainer.watch import Window

GPU = torch.device("cuda", 0)


class NeverWaiting(TorchDispatchMode):
    """Refuse copies between CPU and GPU for which the host waits until the GPU has nothing to do.

    torch.tensor(number, device=gpu) makes one.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten.index.Tensor:
            places = {x.device for x in args[1] if x is not None}
            assert places == {args[0].device}, "the host waits for a copy of the index"
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
            waits = not (kwargs.get("non_blocking") or args[2:] == (True,))
            assert not waits or len({x.device for x in tensors}) == 1, "the host waits for a copy"
        return result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tensors pretend to lie on a GPU, and gradients be there without being computed."""

    def no_gradients(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return tuple(torch.zeros_like(x) for x in inputs)

    def moved(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    data = change(parameter.detach())
                    part._parameters[name] = nn.Parameter(data, parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = change(buffer)
        return module

    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # looks at numbers
    monkeypatch.setattr(torch.autograd, "grad", no_gradients)
    monkeypatch.setattr(nn.Module, "_apply", moved)  # torch's swaps tensors, but no fake ones
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    monkeypatch.setattr("tokenlabel.trainer.models.narrow_heads", lambda backbone: None)
    monkeypatch.setattr(loss_module, "_kernel_for", lambda logits: None)
    with FakeTensorMode():
        yield


def on_gpu(batch: Batch) -> Batch:
    assert batch.maps is not None
    return replace(
        batch,
        images=batch.images.to(GPU),
        classes=batch.classes.to(GPU),
        views=batch.views.to(GPU),
        maps=batch.maps.to(GPU),
        frames=None if batch.frames is None else batch.frames.to(GPU),
    )


# ------------------------------------------------------------------- these tests can fail


@pytest.mark.parametrize(
    "mistake, error",
    [
        (lambda x: x + torch.arange(3), RuntimeError),
        (lambda x: torch.cat([x, torch.zeros(3)]), RuntimeError),
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: 1 if x.any() else 0, DataDependentOutputException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
        (lambda x: x * torch.tensor([2.0], device=x.device), AssertionError),
        (lambda x: x * torch.ones(3).to(x.device), AssertionError),
        (lambda x: x.cpu(), AssertionError),
        (lambda x: x[torch.arange(2)], AssertionError),
    ],
    ids=["cpu-added", "cpu-joined", "item", "if", "boolean", "tensor", "to", "cpu", "index"],
)
def test_a_forgotten_device_or_a_waiting_host_is_noticed(gpu, mistake, error):
    x = torch.zeros(3, device=GPU)
    with NeverWaiting(), pytest.raises(error):
        mistake(x)
    with NeverWaiting():
        (x * 2 + torch.ones(3).to(GPU, non_blocking=True)).to("cpu", non_blocking=True)


# ---------------------------------------------------------------------------- one step

MIXES = {
    "none": None,
    "mix_token": MixBox(1, 0, 3, 2, (4, 4)),
    "mixup": PixelMix(box=MixBox(0, 0, 64, 64, (64, 64)), kept_inside=0.3, tokens=(4, 4)),
    "cutmix": PixelMix(box=MixBox(5, 7, 30, 64, (64, 64)), kept_inside=0.0, tokens=(4, 4)),
}
STUDENTS = {
    "lvvit_t": (),
    "t2t_vit_14": ("model.name='t2t_vit_14'", "model.kwargs={depth=1}"),
    "resnet10t": ("model.name='resnet10t'", "model.kwargs={}"),
}


@pytest.mark.parametrize(
    "student, mix, parts, settings",
    [
        ("lvvit_t", "mix_token", 1, ()),
        ("lvvit_t", "mixup", 2, ("labels.class_target='label'",)),
        ("lvvit_t", "none", 1, ("labels.fill='zero'",)),
        ("t2t_vit_14", "mix_token", 1, ()),
        ("resnet10t", "cutmix", 1, ("model.drop_path=0",)),
    ],
)
def test_the_host_never_waits_in_a_training_step(gpu, monkeypatch, student, mix, parts, settings):
    recipe = tiny_recipe(*STUDENTS[student], *settings)
    model: Any = create_model(recipe.model).to(GPU).train()
    model.to(memory_format=torch.channels_last)
    batch = on_gpu(next(fixed_data(rows=list(range(4))).open_train(None, 0)))
    batch = replace(batch, frames=torch.stack([batch.views, batch.views], 1))
    mixed = MIXES[mix]
    if isinstance(mixed, PixelMix):
        mixed = replace(mixed, tokens=model.grid)
    optimizer, ema = make_optimizer(model, recipe.optim), Ema(model, recipe.ema)
    window = Window(Place(device=GPU))
    found = []

    def backward(total: torch.Tensor) -> None:
        found.append(total)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with NeverWaiting():
        targets = targets_of(batch, recipe, model.grid)
        statistics = batch_statistics(model)
        loss = add_gradients(model, batch, targets, mixed, recipe, parts=parts, bf16=True)
        gradients = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in gradients])
        nn.utils.clip_grads_with_norm_(gradients, 1.0, norm)
        bad = (~(norm.isfinite() & loss.total.isfinite())).float()
        skip_if(optimizer, bad)
        optimizer.step()
        restore_if(bad, statistics)
        ema.update(0, bad)
        window.add([*loss, norm], bad)
    assert len(found) == parts
    assert all(tensor.device == GPU for tensor in (*loss, *found))


def test_the_host_waits_for_an_evaluation_once_at_its_end(gpu):
    model: Any = create_model(tiny_recipe().model).to(GPU)
    batches = iter([on_gpu(next(fixed_data(rows=[0, 1]).open_train(None, 0)))] * 2)
    with NeverWaiting(), pytest.raises(DataDependentOutputException):
        evaluate(model, batches, Place(device=GPU), precision="bf16")
    assert next(batches, None) is None


def test_the_loss_and_its_gradient_stay_on_the_gpu(gpu):
    given = (
        torch.zeros(2, 3, 7, device=GPU, dtype=torch.bfloat16, requires_grad=True),
        torch.zeros(2, 4, device=GPU, dtype=torch.int64),
        torch.zeros(2, 3, 4, device=GPU),
        torch.zeros(2, 3, device=GPU),
        torch.zeros(2, 3, device=GPU),
    )
    with NeverWaiting():
        loss = loss_module.sparse_cross_entropy(*given)
        context: Any = loss.grad_fn
        gradient, *others = type(context)._forward_cls.backward(context, torch.ones_like(loss))
    assert loss.device == gradient.device == GPU
    assert gradient.dtype == torch.bfloat16 and others == [None] * 4


def test_label_pyramids_are_read_on_the_gpu(gpu):
    rng = np.random.default_rng(0)
    pyramid = [random_map(rng, grid=(4, 4)), random_map(rng, grid=(8, 8))]
    maps = PaletteMaps.from_label_maps([pyramid, pyramid]).to(GPU)
    recipe = tiny_recipe()
    batch = Batch(
        images=torch.zeros(2, 3, 64, 64, device=GPU),
        classes=torch.zeros(2, dtype=torch.int64, device=GPU),
        views=crop_view(torch.zeros(2, 4, device=GPU)),
        maps=maps,
        keys=["a", "b"],
    )
    with NeverWaiting():
        assert targets_of(batch, recipe, (4, 4)).tokens.device == GPU


# ------------------------------------------------------------------------------- the feed


@pytest.mark.parametrize("cubic", [False, True])
def test_each_operation_of_rand_augment_runs_on_a_gpu(gpu, cubic):
    pixels = torch.zeros(32, 3, 20, 24, dtype=torch.uint8, device=GPU)
    kinds = np.array([*Operation, *Operation][:32], np.int64)
    kinds = np.resize(kinds, (1, len(pixels)))
    layers = Layers(
        operations=kinds, amounts=np.full(kinds.shape, 0.2), cubic=np.full(kinds.shape, cubic)
    )
    apply_layers(pixels, layers, fill=(1, 2, 3))
    images = torch.empty_like(pixels, dtype=torch.float32)
    normalize(pixels, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), out=images)
    assert images.device == GPU


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_split(
        tmp_path_factory.mktemp("data"), make_samples(f"folder/sample{i}" for i in range(9))
    )


OPTIONS: dict[str, Any] = {
    "image_size": (16, 24),
    "augment": AugmentConfig(random_erasing=0.0),
}
EVAL_OPTIONS: dict[str, Any] = {
    "image_size": (16, 16),
    "crop_pct": 0.875,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.2, 0.2, 0.2),
}


def operators(nodes: list[Any]) -> set[tuple[str, str]]:
    """Name and device of every operator of a graph."""
    found: set[tuple[str, str]] = set()
    waiting, seen = [node.source for node in nodes], set()
    while waiting:
        instance: Any = waiting.pop()
        if instance in seen:
            continue
        seen.add(instance)
        schema = instance._op._schema
        found.add((schema.Name() if hasattr(schema, "Name") else "", instance._op.device))
        waiting += [node.source for node in instance.inputs]
    return found


@pytest.mark.parametrize("job", ["train", "eval"])
def test_dali_has_each_operator_on_the_device_that_it_is_given(data, monkeypatch, job):
    outputs: list[Any] = []

    def refuse(pipeline: Pipeline, *_: Any) -> None:
        raise InterruptedError  # what follows needs a GPU

    def keep(pipeline: Pipeline, *nodes: Any) -> None:
        outputs.extend(nodes)

    monkeypatch.setattr(feed_module, "_with_index", lambda device: GPU)
    monkeypatch.setattr(feed_module, "_build", refuse)
    monkeypatch.setattr(Pipeline, "set_outputs", keep)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    with pytest.raises(InterruptedError):
        if job == "train":
            TrainFeed(data, batch_size=4, device=GPU, **OPTIONS)
        else:
            next(iter(EvalFeed(data, "train", batch_size=4, device=GPU, **EVAL_OPTIONS)))
    found = operators(outputs)
    dali: Any = backend
    known = {"cpu": dali.RegisteredCPUOps(), "gpu": dali.RegisteredGPUOps()}
    for name, device in found:
        assert name in known[device], (name, device)
    assert {name for name, device in found if device == "gpu"} == {"Resize", "CropMirrorNormalize"}


class _NoStream:
    def synchronize(self) -> None:
        pass


def test_the_feeds_graph_for_gpus_gives_the_batches_of_the_cpus(data, monkeypatch):
    """All of it but where its operators run: flips, filters, planes, and resuming."""
    options: dict[str, Any] = OPTIONS | {"batch_size": 4, "num_threads": 1, "shuffle_buffer": 8}
    feed = TrainFeed(data, **options)
    expected = [next(feed) for _ in range(4)]
    feed.close()
    graph, finish = feed_module._train_pipeline, TrainFeed._finish

    def graph_for_gpus(*arguments: Any, **options: Any) -> Pipeline:
        return graph(*arguments, **options | {"gpu": True})

    def finish_as_on_gpus(self: Any, *given: Any) -> torch.Tensor:
        self._stream = _NoStream()
        return finish(self, *given)

    monkeypatch.setattr(feed_module, "_train_pipeline", graph_for_gpus)
    monkeypatch.setattr(DataNode, "gpu", lambda node: node)
    monkeypatch.setattr(TrainFeed, "_finish", finish_as_on_gpus)
    feed = TrainFeed(data, **options)
    found = [next(feed) for _ in range(2)]
    state = feed.state()
    feed.close()
    feed = TrainFeed(data, state=state, **options)
    found += [next(feed) for _ in range(2)]
    feed.close()
    for theirs, ours in zip(expected, found, strict=True):
        assert theirs.keys == ours.keys
        assert torch.equal(theirs.views, ours.views)
        difference = (theirs.images - ours.images).abs().flatten(1).median(1).values
        assert float(difference.max()) < 0.05


# ---------------------------------------------------------------------- the loss's kernel


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "num_classes, num_columns, with_gradient", [(1000, 64, True), (21_841, 1, False)]
)
def test_the_kernel_compiles_for_a_gpu(
    monkeypatch, tmp_path, dtype, num_classes, num_columns, with_gradient
):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from tokenlabel.trainer.loss_kernel import _kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "num_classes": num_classes,
        "block_c": triton.next_power_of_2(num_classes),
        "block_u": triton.next_power_of_2(num_columns),
        "with_gradient": with_gradient,
    }
    types = {
        "logits": f"*{dtype}",
        "palette": "*i64",
        **dict.fromkeys(("probabilities", "background", "weights", "losses"), "*fp32"),
        "gradient": f"*{dtype}",
        **dict.fromkeys(("num_tokens", "num_columns"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    names = _kernel.arg_names
    source = triton.compiler.ASTSource(
        fn=_kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(7)},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4 if num_classes <= 2048 else 16},
    )
    code = compiled.asm["ptx"]
    assert "ld.local" not in code, "registers do not hold what they should"
    if num_classes == 1000:  # 16 bytes at a time
        assert "ld.global.v4" in code and "st.global.v4" in code
    assert with_gradient == bool(re.search(r"bar\.sync[^}]*st\.global", code.rpartition("v4")[2]))


# ------------------------------------------------------------------------------- the rest


def test_the_teacher_scores_on_the_gpu(gpu, monkeypatch):
    monkeypatch.setattr(teacher_module, "_sha256", lambda weights: "")
    model = timm.create_model("resnet10t", num_classes=9)
    whole = as_teacher(model, name="resnet10t", image_size=64, device=GPU)
    halved = whole.in_space(
        LabelSpace(kind="all", members=[[0, 1], [2], []], num_teacher_classes=9)
    )
    assert whole.precision == "bf16"
    images = torch.zeros(2, 3, 96, 96, dtype=torch.uint8).to(GPU)
    with NeverWaiting(), torch.inference_mode():
        for teacher in (whole, halved):
            for cells in (teacher.cells(images), tiled_cells(teacher, images, 64)):
                parts = reduce_to_top_k(teacher.classify(cells), 2)
                assert {part.device for part in parts} == {GPU}


@pytest.mark.parametrize("method", METHODS)
def test_heatmaps_are_made_on_the_gpu(gpu, monkeypatch, method):
    if method == "random":
        pytest.skip("its noise depends on the numbers")
    model: Any = create_model(tiny_recipe().model).to(GPU).eval()
    for module in ("attention", "dense"):
        monkeypatch.setattr(f"tokenlabel.explainer.{module}.has_dense_head", lambda model: True)
    classes = torch.tensor([1, 2], device=GPU)
    found = explain(method, model, torch.zeros(2, 3, 64, 64, device=GPU), classes, Options())
    assert found.device == GPU


def test_a_segmenter_learns_and_predicts_on_the_gpu(gpu):
    config = SegModelConfig(num_classes=5, image_size=64, kwargs=TINY_SEGMENTER)
    model: Any = create_segmenter(config).to(GPU)
    with torch.autocast("cuda", torch.bfloat16):
        logits, aux_logits = model.train()(torch.zeros(2, 3, 64, 64, device=GPU))
    masks = torch.zeros(2, 64, 64, dtype=torch.int64, device=GPU)
    with NeverWaiting():
        assert seg_loss(logits, aux_logits, masks, averaging="standard").total.device == GPU
    seen = InferenceConfig(short_px=64, long_px=128, window_px=64, stride_px=43)
    image = torch.zeros(3, 70, 90, dtype=torch.uint8)
    found = segment(
        model.eval(), image, seen, mean=(0.5,) * 3, std=(0.2,) * 3, flip=True, precision="bf16"
    )
    assert found.device == GPU and found.shape == (70, 90)


def test_processes_of_one_machine_do_not_share_a_gpu_that_was_named(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="cuda:1 is one GPU, and this machine has 2 processes"):
        with join_processes("cuda:1"):
            pass
