"""What the README says can be done: its commands parse, its tree is the folder's, links lead on."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tokenlabel import cli
from tokenlabel.trainer.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {
    "tl-label": cli.label,
    "tl-shard": cli.shard,
    "tl-train": cli.train,
    "tl-eval": cli.evaluate,
    "tl-seg": cli.segment,
    "tl-explain": cli.explain,
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_lines(page: Path) -> list[str]:
    """Lines of code blocks, indented or fenced, with continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines, fenced = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return lines


def commands_in(page: Path) -> Iterator[list[str]]:
    """Each tl-… command of a page as its words; launchers before it and comments are cut off."""
    for line in code_lines(page):
        match = re.search(r"(?:^|\s)(tl-(?:label|shard|train|eval|seg|explain)\s.*)", line)
        if match and "──" not in line:
            words = shlex.split(match[1].removeprefix("$ "), comments=True)
            yield words[: words.index(">")] if ">" in words else words


ALL_COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)}")
    for page in PAGES
    for words in commands_in(page)
]


def parse(words: list[str]) -> dict[str, object]:
    """Let click parse a command without running it; return the values of its options."""
    command, arguments = COMMANDS[words[0]], words[1:]
    context = click.Context(command)
    while isinstance(command, click.Group):
        _, command, arguments = command.resolve_command(context, arguments)
        assert command is not None
    return command.make_context(" ".join(words[:2]), list(arguments)).params


def test_the_readme_shows_the_whole_way():
    shown = {" ".join(words[:2]) for words in commands_in(ROOT / "README.md")}
    assert shown >= {"tl-label generate", "tl-shard pack", "tl-train run"}
    assert any(words[0] == "tl-eval" for words in commands_in(ROOT / "README.md"))


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_commands_in_the_documentation_parse(words: list[str]):
    values = parse([word for word in words if word != "…"])
    if words[:2] == ["tl-train", "run"] and not str(values["recipe"]).endswith(".toml"):
        load_recipe(str(values["recipe"]))  # a file of the reader's own is not there yet


def test_a_misspelt_option_would_be_noticed():
    with pytest.raises(click.NoSuchOption):
        parse(["tl-shard", "pack", "--image", "photos", "--out", "shards", "--split", "train"])


def test_make_targets_in_the_documentation_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    shown = {
        match[1]
        for page in PAGES
        for line in code_lines(page)
        if (match := re.match(r"make ([a-z-]+)", line))
    }
    assert {"demo", "test"} <= shown <= targets


def tree_paths() -> set[str]:
    """Files and folders in the README's tree: two spaces of indent a level, folders end in /."""
    block = README.split("## The house")[1]
    paths, folders = set(), []
    for line in block.splitlines():
        match = re.match(r"    ( *)(\S+?)(/?)(?:\s\s+\S.*)?$", line)
        if not match:
            continue
        folders = folders[: len(match[1]) // 2]
        paths.add("/".join([*folders, match[2]]))
        if match[3]:
            folders.append(match[2])
    return paths


def test_the_tree_in_the_readme_is_on_disk():
    missing = [path for path in tree_paths() if not (ROOT / path).exists()]
    assert not missing


def test_every_python_file_of_the_package_is_in_the_tree():
    stages = ["labeler", "shards", "trainer", "evaluator", "segmenter", "explainer", "examples"]
    files = {
        path.relative_to(ROOT).as_posix()
        for stage in stages
        for path in (ROOT / stage).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert files - tree_paths() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing
