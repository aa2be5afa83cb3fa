"""Freed memory stays in the process and threads wait briefly, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tokenlabel import cli
from tokenlabel.labeler import cpu

COUNT_FAULTS = """
import resource, sys, threading
from tokenlabel.labeler import cpu
told = cpu.keep_freed_memory() if sys.argv[1] == "keep" else None

def work():
    for _ in range(20):
        bytearray(16 * 2**20)  # 4,096 pages

work()  # the first time pages are new in any case
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
other = threading.Thread(target=work)
other.start(), other.join()
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HAS_GLIBC = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})


def page_faults(how: str, **variables: str) -> tuple[str, int]:
    found = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, how],
        env=os.environ | variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told, count = found.stdout.split()
    return told, int(count)


@pytest.mark.skipif(not HAS_GLIBC, reason="needs glibc")
def test_blocks_that_were_freed_are_used_again_without_new_pages():
    told, count = page_faults("keep")
    assert told == "True" and count < 1000
    assert page_faults("leave", GLIBC_TUNABLES="")[1] > 4096


@pytest.mark.skipif(not HAS_GLIBC, reason="needs glibc")
@pytest.mark.parametrize(
    "variable", [("MALLOC_MMAP_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.check=0")]
)
def test_the_users_own_variables_win(variable):
    told, _ = page_faults("keep", **dict([variable]))
    assert told == "False"


def test_other_tunables_are_no_matter():
    assert not cpu.is_set_up_by({"GLIBC_TUNABLES": "glibc.pthread.rseq=0", "PATH": "/bin"})


def test_a_system_without_mallopt_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(cpu.os, "environ", {})
    assert not cpu.keep_freed_memory()


@pytest.mark.parametrize(
    ("device", "has_gpu", "expected"),
    [("auto", False, 1), ("auto", True, 0), ("cpu", True, 1), ("cuda:1", True, 0)],
)
def test_commands_keep_memory_where_a_cpu_computes(
    tmp_path, monkeypatch, device, has_gpu, expected
):
    (tmp_path / "gpu").touch()
    monkeypatch.setattr(cpu, "_GPU_FILES", (str(tmp_path / ("gpu" if has_gpu else "none")),))
    calls = []
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: calls.append(True))
    arguments = ["--data", str(tmp_path), "--recipe", "lvvit_s_224", "--device", device]
    CliRunner().invoke(cli.train, ["run", *arguments, "--out", str(tmp_path / "out")])
    assert len(calls) == expected


def test_commands_without_a_device_leave_the_allocator_alone(monkeypatch):
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: pytest.fail("called"))
    assert CliRunner().invoke(cli.train, ["recipes"]).exit_code == 0


@pytest.mark.parametrize("variable", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_threads_wait_as_the_user_says(monkeypatch, variable):
    monkeypatch.setattr(cpu.os, "environ", {variable: "ACTIVE"})
    cpu.wait_briefly()
    assert cpu.os.environ == {variable: "ACTIVE"}


def test_threads_wait_briefly_in_commands_and_in_those_they_start():
    command = "import os, tokenlabel.cli as _; print(os.environ['GOMP_SPINCOUNT'])"
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    found = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    assert int(found.stdout) > 0
