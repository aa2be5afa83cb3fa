"""What labelling will take: the arithmetic is right, the limit is named, nothing is written."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from colour_teacher import NUM_CLASSES, colour_teacher, patchwork

from tokenlabel.cli import label
from tokenlabel.labeler import plan as plan_module
from tokenlabel.labeler.generate import generate
from tokenlabel.labeler.label_set import read_index
from tokenlabel.labeler.plan import Measured, Wave, extrapolate, in_words, measure, spread
from tokenlabel.labeler.score import CellScores
from tokenlabel.labeler.sources import ImageSource, Sample, open_source

SIZES = [(96, 64), (64, 96), (80, 80)]
STAGES = ["reading", "decoding", "teacher", "encoding"]


def measured(**changes) -> Measured:
    """Four images on a GPU machine of 8 cores: 1 ms to read, 8 to decode, 2 in the teacher."""
    defaults = Measured(
        settings={
            "teacher": "some_net",
            "image_sizes": [64],
            "device": "some GPU",
            "precision": "bf16",
            "fit": "native",
            "top_k": 5,
        },
        num_listed=1000,
        read_secs=[0.001] * 4,
        decode_secs=[0.008] * 4,
        bad={},
        waves=[Wave(0, 1, 2 * 4096, 0.004)],
        image_px=[[4096] * 4],
        encode_secs=[0.0003] * 4,
        map_bytes=[1000] * 4,
        tar_bytes=[1536] * 4,
        batch_size=2,
        num_workers=8,
        num_cores=8,
        teacher_cores=0,
        memory_bytes=6 * 10**9,
        memory_limit_bytes=10 * 10**9,
    )
    return replace(defaults, **changes)


def secs_of(found, stage: str) -> float:
    return 1 / found.images_per_sec[stage].value


# -------------------------------------------------------------------------------- extrapolation


def test_hours_and_bytes_are_those_of_adding_up_image_after_image():
    rng = np.random.default_rng(0)
    read, decode = rng.uniform(0.001, 0.01, (2, 5))
    sizes_px = [[100, 200, 100, 300], [900, 1800, 900, 2700]]
    found = extrapolate(
        measured(
            num_listed=1000,
            read_secs=read.tolist(),
            decode_secs=decode.tolist(),
            bad={"broken": "empty"},  # one of five: four have maps
            waves=[Wave(0, 1, 400, 1.0), Wave(0, 1, 600, 3.0), Wave(1, 1, 1000, 3.0)],
            image_px=sizes_px,
            encode_secs=[0.01, 0.02, 0.03, 0.04],
            map_bytes=[1000, 2000, 3000, 4000],
            tar_bytes=[1536, 2560, 3584, 4608],
            num_workers=3,
            num_cores=4,
            teacher_cores=4,
        ),
        shard_size=250,
    )
    # One thing after the other, as if the four cores were one that is four times as fast.
    secs = 0.0
    good = 0
    tar_bytes = [0] * 4
    for number in range(1000):
        secs += decode[number % 5] / 4
        if number % 5 == 4:
            continue
        secs += sizes_px[0][good % 4] * (4.0 / 1000) + sizes_px[1][good % 4] * (3.0 / 1000)
        secs += [0.01, 0.02, 0.03, 0.04][good % 4] / 4
        tar_bytes[number // 250] += [1536, 2560, 3584, 4608][good % 4]
        good += 1
    assert found.hours.value == pytest.approx(secs / 3600)
    whole_tars = [-(-(size + 1024) // 10240) * 10240 for size in tar_bytes]
    assert found.tar_bytes.value == sum(whole_tars)
    assert found.bytes_per_map.value == 2500
    assert found.num_quarantined == 1000 - good == 200
    assert (found.num_slices, found.num_files) == (4, 9)
    assert found.limit == "teacher"


def test_on_a_gpu_the_slowest_stage_sets_the_time():
    found = extrapolate(measured(waves=[Wave(0, 1, 4096, 0.5)]), shard_size=1000)
    assert found.hours.value == pytest.approx(1000 * 0.5 / 3600)
    assert secs_of(found, "together") == pytest.approx(secs_of(found, "teacher"))
    found = extrapolate(measured(decode_secs=[0.8] * 4), shard_size=1000)
    assert found.hours.value == pytest.approx(1000 * (0.001 + 0.8) / 8 / 3600)


def test_on_a_cpu_decoding_and_teacher_take_turns():
    on_cpu = measured(teacher_cores=8, memory_limit_bytes=None, waves=[Wave(0, 8, 4096, 0.001)])
    found = extrapolate(on_cpu, shard_size=1000)
    assert secs_of(found, "together") == pytest.approx(0.008 / 8 + 0.001 + 0.0003 / 8)


@pytest.mark.parametrize(
    ("changes", "limit", "advice"),
    [
        ({"read_secs": [0.9] * 4}, "reading", "more --workers than 8: they wait for the storage"),
        ({"decode_secs": [0.9] * 4}, "decoding", "more cores for each GPU"),
        (
            {"decode_secs": [0.9] * 4, "num_workers": 2},
            "decoding",
            "more --workers: 2 decode, there are 8 cores",
        ),
        (
            {"decode_secs": [0.9] * 4, "teacher_cores": 8, "memory_limit_bytes": None},
            "decoding",
            "more cores, more machines",
        ),
        ({"waves": [Wave(0, 1, 4096, 0.9)]}, "teacher", "more GPUs (torchrun, --part)"),
        (
            {"waves": [Wave(0, 1, 4096, 0.9)], "memory_bytes": 4 * 10**9},
            "teacher",
            "a --batch-size above 2, 4.0 of 10.0 GB are in use",
        ),
        (
            {
                "waves": [Wave(0, 8, 4096, 0.9)],
                "teacher_cores": 8,
                "memory_limit_bytes": None,
            },
            "teacher",
            "a GPU, more machines",
        ),
        ({"encode_secs": [0.9] * 4}, "encoding", "one thread encodes: more processes"),
        # Reading waits without a core: it limits only where it alone is slower than all the rest.
        (
            {"read_secs": [0.05] * 4, "teacher_cores": 8, "memory_limit_bytes": None},
            "reading",
            "faster storage",
        ),
    ],
)
def test_what_limits_is_named_with_what_to_do(changes, limit, advice):
    found = extrapolate(measured(**changes), shard_size=1000)
    assert found.limit == limit
    assert advice in found.advice[0]
    words = in_words(found)
    assert words["limit"] == limit
    assert advice in words["advice"]


def test_a_gpu_that_is_nearly_full_is_pointed_out():
    found = extrapolate(measured(memory_bytes=95 * 10**8), shard_size=1000)
    assert "a smaller --batch-size: 9.5 of 10.0 GB are in use" in found.advice[-1]


@pytest.mark.parametrize(("num_images", "shard_size"), [(1000, 10), (1000, 300), (999, 10), (5, 2)])
@pytest.mark.parametrize("num_processes", [1, 3, 8, 200])
def test_the_busiest_process_is_found_by_dealing_out_slices(num_images, shard_size, num_processes):
    num_slices = -(-num_images // shard_size)
    cuts = [i * num_images // num_slices for i in range(num_slices + 1)]
    hands = [0] * num_processes
    for number in range(num_slices):
        hands[number % num_processes] += cuts[number + 1] - cuts[number]
    found = extrapolate(
        measured(num_listed=num_images), shard_size=shard_size, num_processes=num_processes
    )
    # Slices differ by one image: the estimate takes the larger for all.
    per_process = -(-num_slices // num_processes)
    assert max(hands) <= found.num_busiest <= min(num_images, max(hands) + per_process)
    ratio = found.num_busiest / num_images
    assert found.hours_shared.value == pytest.approx(found.hours.value * ratio)


def test_the_shard_size_advised_shares_slices_out_evenly():
    uneven = extrapolate(measured(), shard_size=300, num_processes=3)
    assert uneven.num_busiest == 500
    assert "--shard-size 167" in uneven.advice[-1]
    assert "one of the 3 processes has 500 images" in uneven.advice[-1]
    even = extrapolate(measured(), shard_size=167, num_processes=3)
    assert even.num_busiest <= 334
    assert len(even.advice) == 1


def test_bounds_come_from_waves_and_from_images():
    same = extrapolate(measured(), shard_size=1000)
    assert same.hours.low == pytest.approx(same.hours.high)
    waves = [Wave(0, 1, 4096, secs) for secs in (0.4, 0.5, 0.9)]
    found = extrapolate(measured(waves=waves), shard_size=1000)
    speed = found.images_per_sec["teacher"]
    assert [1 / speed.high, 1 / speed.value, 1 / speed.low] == pytest.approx([0.4, 0.6, 0.9])
    assert found.hours.low == pytest.approx(1000 * 0.4 / 3600)
    assert found.hours.high == pytest.approx(1000 * 0.9 / 3600)
    mixed = extrapolate(measured(map_bytes=[500, 1500, 800, 1200]), shard_size=1000)
    assert mixed.bytes_per_map.low < 1000 == mixed.bytes_per_map.value < mixed.bytes_per_map.high


def test_the_bytes_of_a_source_measured_whole_are_no_guess():
    whole = measured(num_listed=4, map_bytes=[500, 1500, 800, 1200], tar_bytes=[1024, 2048] * 2)
    found = extrapolate(whole, shard_size=1000)
    assert found.bytes_per_map == (1000, 1000, 1000)
    assert found.tar_bytes == (10240, 10240, 10240)


@pytest.mark.parametrize("options", [{"shard_size": 0}, {"shard_size": 9, "num_processes": 0}])
def test_nothing_is_shared_out_to_nobody(options):
    with pytest.raises(ValueError, match="0 is not 1 or more"):
        extrapolate(measured(), **options)


# ------------------------------------------------------------------------------------- measuring


@pytest.fixture
def photos(tmp_path) -> Callable[..., Path]:
    """Make a folder of so many photos of three shapes."""

    def make(num_photos: int, *, num_broken: int = 0) -> Path:
        root = tmp_path / "photos"
        root.mkdir()
        for number in range(num_photos):
            patchwork(number, size=SIZES[number % 3]).save(root / f"{number:02}.png")
        for number in range(num_broken):
            # Among the others, not at an end of the list.
            (root / f"{number:02}-broken.jpg").write_bytes(b"\xff\xd8\xff no image")
        return root

    return make


def test_the_sample_is_spread_evenly():
    assert spread(5, 5) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(100, 4) == [12, 37, 62, 87]
    for wanted in (1, 7, 99):
        chosen = spread(1000, wanted)
        gaps = np.diff([-1 - chosen[0], *chosen])
        assert len(set(chosen)) == wanted
        assert max(gaps[1:], default=0) - min(gaps[1:], default=0) <= 1


def test_planned_bytes_are_those_that_generate_writes(photos, tmp_path):
    root = photos(9, num_broken=2)
    for name in ("é" * 30, "long " + "x" * 150):  # names that a tar keeps in a header of their own
        patchwork(99, size=(64, 64)).save(root / f"{name}.png")
    source, teacher = open_source(root), colour_teacher(64)
    options = {"teacher": teacher, "top_k": 3, "batch_size": 2, "num_workers": 2}
    planned = extrapolate(measure(source, **options), shard_size=100)
    generate(source, tmp_path / "labels", shard_size=100, **options)
    index = read_index(tmp_path / "labels")
    assert planned.tar_bytes.value == index["tar_bytes"]
    assert planned.bytes_per_map.value * 11 == pytest.approx(index["map_bytes"])
    assert planned.num_quarantined == index["num_quarantined"] == 2
    assert planned.bad == index["quarantined"]
    assert planned.num_files == len(list((tmp_path / "labels").iterdir()))


def test_planned_bytes_of_a_pyramid_are_those_that_generate_writes(photos, tmp_path):
    source, teacher = open_source(photos(6)), colour_teacher(32)
    options = {"teacher": teacher, "levels": [32, 64], "top_k": 3, "score_bits": 8, "mass": 0.9}
    planned = extrapolate(measure(source, batch_size=2, **options), shard_size=100)
    generate(source, tmp_path / "labels", batch_size=2, **options)
    assert planned.tar_bytes.value == read_index(tmp_path / "labels")["tar_bytes"]
    assert planned.settings["image_sizes"] == [32, 64]


def test_only_full_batches_are_timed_and_every_image_is_scored(photos):
    found = measure(
        open_source(photos(7)), teacher=colour_teacher(64), top_k=3, batch_size=2, num_workers=1
    )
    num_parallel = torch.get_num_threads()
    assert len(found.map_bytes) == len(found.image_px[0]) == 7
    assert found.waves
    for wave in found.waves:
        assert wave.num_batches == num_parallel
        # A 2:3 photo comes to 56×80 px in cells of 8, a square one to 64×64.
        assert 2 * num_parallel * 4096 <= wave.num_px <= 2 * num_parallel * 4480
    assert sum(wave.num_batches for wave in found.waves) >= 3


def test_one_batch_is_filled_up_where_no_shape_fills_one(photos):
    found = measure(
        open_source(photos(5)), teacher=colour_teacher(64), top_k=3, batch_size=8, num_workers=1
    )
    (wave,) = found.waves
    assert wave.num_px == torch.get_num_threads() * 8 * 4480


def test_larger_levels_go_in_smaller_batches(photos):
    found = measure(
        open_source(photos(9)),
        teacher=colour_teacher(32),
        levels=[32, 64],
        fit="stretch",
        top_k=3,
        batch_size=8,
    )
    per_batch = {wave.level: wave.num_px / wave.num_batches for wave in found.waves}
    assert per_batch == {0: 8 * 32 * 32, 1: 2 * 64 * 64}


def test_unreadable_images_of_the_sample_are_extrapolated(photos):
    found = measure(
        open_source(photos(6, num_broken=2)), teacher=colour_teacher(64), top_k=3, num_images=8
    )
    assert sorted(found.bad) == ["00-broken", "01-broken"]
    assert len(found.read_secs) == len(found.decode_secs) == 8
    assert len(found.map_bytes) == 6
    planned = extrapolate(replace(found, num_listed=8000), shard_size=1000)
    assert planned.num_quarantined == 2000
    assert in_words(planned)["left out"] == "about 2,000 images, as 2 of those measured"


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(plan_module.time, "perf_counter", lambda: self.now)


def test_each_stage_gets_its_own_time(photos, monkeypatch):
    clock = Clock(monkeypatch)
    load, encode = plan_module.load_inputs, plan_module.MapCoding.encode
    read = ImageSource.read

    def slow_read(source: ImageSource, sample: Sample) -> bytes:
        clock.now += 1
        return read(source, sample)

    def slow_load(*args, **options):
        inputs = load(*args, **options)
        clock.now += 10
        return inputs

    def slow_encode(*args):
        clock.now += 1000
        return encode(*args)

    class OneAtATime(plan_module.Scorer):
        """Time passes when a batch is fetched, 100 s for each image of it."""

        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            self.num_parallel = 1

        def start(self, images, *, level=0) -> Callable[[], CellScores]:
            fetch = super().start(images)

            def slow_fetch() -> CellScores:
                clock.now += 100 * len(images)
                return fetch()

            return slow_fetch

    monkeypatch.setattr(ImageSource, "read", slow_read)
    monkeypatch.setattr(plan_module, "load_inputs", slow_load)
    monkeypatch.setattr(plan_module.MapCoding, "encode", slow_encode)
    monkeypatch.setattr(plan_module, "Scorer", OneAtATime)
    found = measure(
        open_source(photos(7)),
        teacher=colour_teacher(64),
        fit="stretch",
        top_k=3,
        batch_size=3,
        num_workers=1,
    )
    assert found.read_secs == [1] * 7
    assert found.decode_secs == [10] * 7
    assert found.encode_secs == [1000] * 7
    assert found.waves == [Wave(0, 1, 3 * 64 * 64, 300)] * 2
    planned = extrapolate(found, shard_size=100)
    assert [secs_of(planned, name) for name in STAGES] == pytest.approx([1, 10, 100, 1000])


def test_nothing_is_written(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = open_source(photos(3))
    before = sorted(tmp_path.rglob("*"))
    extrapolate(measure(source, teacher=colour_teacher(64), top_k=3), shard_size=10)
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, f"top-k 0 is not between 1 and {NUM_CLASSES}"),
        ({"top_k": NUM_CLASSES + 1}, f"is not between 1 and {NUM_CLASSES}: nearest colour has"),
        ({"mass": 1.5}, "mass 1.5 is not a probability between 0 and 1, e.g. 0.99"),
        ({"fit": "wide"}, "fit 'wide' is not one of native, stretch, center"),
        ({"levels": [64, 65]}, "come to 64,64 px in whole cells of 8 px; each must be larger"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(photos, options, message):
    source = replace(open_source(photos(1)), samples=[])
    with pytest.raises(ValueError, match=message):
        measure(source, teacher=colour_teacher(64), **{"top_k": 3, **options})


def test_a_teacher_of_one_size_says_which_fits_suit_it(photos):
    teacher = replace(colour_teacher(64), square_only=True)
    source = open_source(photos(1))
    for options in ({}, {"fit": "stretch", "levels": [64, 96]}):
        with pytest.raises(ValueError, match="takes images of 64x64 px alone"):
            measure(source, teacher=teacher, top_k=3, **options)


def test_a_source_without_a_readable_image_says_why(photos):
    source = open_source(photos(0, num_broken=2))
    with pytest.raises(ValueError, match="none of the 2 images measured .*, 00-broken: .*JPEG"):
        measure(source, teacher=colour_teacher(64), top_k=3)


# ------------------------------------------------------------------------------- the command line


@pytest.fixture
def weights(tmp_path) -> list[str]:
    import timm

    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=12).state_dict(), path)
    return ["--teacher", "test_resnet", "--checkpoint", str(path), "--device", "cpu"]


def test_the_command_prints_what_people_ask(photos, weights):
    command = ["plan", "--images", str(photos(6, num_broken=1)), *weights]
    command += ["--image-size", "64", "--top-k", "3", "--processes", "2", "--shard-size", "4"]
    result = CliRunner().invoke(label, command, catch_exceptions=False)
    assert result.exit_code == 0
    lines = {line[:12].strip(): line[12:] for line in result.stdout.splitlines()}
    assert lines["with"].startswith("test_resnet at 64 px, fp32 on cpu; fit native, top 3")
    assert lines["measured"].startswith("7 of 7 images, ")
    assert all(lines[name].endswith(" images/s") for name in [*STAGES, "together"])
    assert "on 2 such devices" in lines["time"]
    assert "2 slices, 5 files" in lines["label set"]
    assert lines["left out"] == "about 1 image, as 1 of those measured"
    assert lines["limit"] in STAGES
    assert "  left out: 00-broken: " in result.stdout


def test_json_holds_the_plan_alone(photos, weights):
    command = ["plan", "--images", str(photos(4)), *weights, "--levels", "64,96", "--json"]
    result = CliRunner().invoke(label, command, catch_exceptions=False)
    content = json.loads(result.stdout)
    assert set(content) == {
        *("settings", "num_images", "num_measured", "bad", "num_quarantined", "batch_size"),
        *("num_batches", "num_workers", "images_per_sec", "limit", "hours", "num_processes"),
        *("hours_shared", "num_busiest", "bytes_per_map", "tar_bytes", "num_slices", "num_files"),
        *("memory_bytes", "memory_limit_bytes", "advice"),
    }
    assert set(content["images_per_sec"]) == {*STAGES, "together"}
    assert set(content["hours"]) == {"value", "low", "high"}
    assert content["settings"]["image_sizes"] == [64, 96]
    assert content["memory_bytes"] > 10**7
    assert content["memory_limit_bytes"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--levels", "big"], "levels 'big' are not sizes in px"),
        (["--levels", "32,64", "--image-size", "64"], "--image-size and --levels: give one"),
        (["--top-k", "13"], "top-k 13 is not between 1 and 12"),
    ],
)
def test_mistakes_are_one_line(photos, weights, options, message):
    result = CliRunner().invoke(label, ["plan", "--images", str(photos(1)), *weights, *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


# ------------------------------------------------------------------------ job files of clusters


@pytest.fixture
def job_files(docs_folder) -> Callable[[str], list[str]]:
    """Return the fenced blocks of docs/label-generation.md in a language."""
    text = (docs_folder / "label-generation.md").read_text(encoding="utf-8")
    return lambda language: re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_slurm_scripts_are_bash_and_share_all_parts_out(job_files):
    scripts = job_files("bash")
    assert len(scripts) == 2
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        (tasks,) = re.findall(r"^#SBATCH --array=1-(\d+)$", script, re.M)
        assert re.search(rf"^parts={tasks}\b", script, re.M)
        assert '--part "$SLURM_ARRAY_TASK_ID/$parts"' in script


def run_pod(job_files, folder: Path, program: str) -> subprocess.Popen:
    """Start what the container of the Kubernetes job runs, with a program in place of tl-label."""
    (job,) = (yaml.safe_load(text) for text in job_files("yaml"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    fake = folder / "tl-label"
    fake.write_text(f"#!{sys.executable}\n{program}")
    fake.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [*container["command"], *container["args"]],
        env={**os.environ, "PATH": path, "JOB_COMPLETION_INDEX": "4"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_pods_share_all_parts_out(job_files, tmp_path):
    (job,) = (yaml.safe_load(text) for text in job_files("yaml"))
    assert job["spec"]["completionMode"] == "Indexed"
    pod = run_pod(job_files, tmp_path, "import sys; print(*sys.argv[1:]); sys.exit(3)")
    printed, _ = pod.communicate(timeout=60)
    assert printed.split()[-2:] == ["--part", f"5/{job['spec']['completions']}"]
    assert pod.returncode == 3


def test_a_pod_that_is_told_to_stop_does_not_count_as_done(job_files, tmp_path):
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('in good order'), sys.exit(0)))\n"
        "print('at work', flush=True)\n"
        "signal.pause()\n"
    )
    pod = run_pod(job_files, tmp_path, program)
    assert pod.stdout is not None
    assert pod.stdout.readline() == "at work\n"
    pod.send_signal(signal.SIGTERM)
    printed, _ = pod.communicate(timeout=60)
    assert printed == "in good order\n"
    assert pod.returncode == 128 + signal.SIGTERM
