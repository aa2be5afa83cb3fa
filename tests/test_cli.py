"""What all commands do alike."""

import subprocess
import sys

COMMAND = """
import click
from tokenlabel import cli

@click.command(cls=cli._Command)
@click.option("--fail", is_flag=True)
def many_lines(fail):
    if fail:
        raise BrokenPipeError("a worker has died")
    for i in range(100_000):
        click.echo(i)

many_lines()
"""


def run(*arguments: str, num_lines: int) -> tuple[int, str]:
    """Read a few lines and no more, as `head` does."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        for i in range(num_lines):
            assert process.stdout.readline() == f"{i}\n"
        process.stdout.close()
        errors = process.stderr.read()
    return process.returncode, errors


def test_output_that_nobody_reads_to_its_end_is_no_error_to_speak_of():
    assert run(num_lines=2) == (1, "")


def test_a_broken_pipe_within_a_command_is_told():
    found = subprocess.run(
        [sys.executable, "-c", COMMAND, "--fail"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "a worker has died" in found.stderr
