"""What is installed is what stands on disk, and nothing of it has a generic name."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
NOT_INSTALLED = {"tests", "benchmarks", "examples"}


def folder_of(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def top_folders_with_python() -> set[str]:
    """Folders at the root that git would see and that hold Python files at any depth."""
    folders = [
        path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))
    ]
    generated = {"build", "dist", "demo", "work"}
    return {f.name for f in folders if f.name not in generated and any(f.rglob("*.py"))}


def packages_on_disk() -> set[str]:
    stages = top_folders_with_python() - NOT_INSTALLED
    inits = [init for stage in stages for init in (ROOT / stage).rglob("__init__.py")]
    return {"tokenlabel"} | {
        ".".join(["tokenlabel", *init.parent.relative_to(ROOT).parts]) for init in inits
    }


def test_the_packages_list_is_the_folders_on_disk():
    assert set(SETUPTOOLS["packages"]) == packages_on_disk()


def test_every_folder_with_python_is_installed_or_known_not_to_be():
    installed = {package.split(".")[1] for package in SETUPTOOLS["packages"] if "." in package}
    assert installed <= top_folders_with_python() <= installed | NOT_INSTALLED


def test_every_installed_folder_with_python_is_a_package():
    for stage in top_folders_with_python() - NOT_INSTALLED:
        for file in (ROOT / stage).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file.relative_to(ROOT)


def test_the_root_holds_no_python_but_the_package_and_the_commands():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}


def test_every_data_file_of_a_package_is_shipped():
    shipped = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
    }
    folders = [folder_of(p) for p in SETUPTOOLS["packages"] if p != "tokenlabel"]
    on_disk = {
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"} and path.name != ".gitkeep"
    }
    assert on_disk == shipped


def in_a_clean_interpreter(code: str) -> str:
    """Run code with neither the current folder nor PYTHONPATH on the path."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["cli", *sorted(top_folders_with_python())])
def test_no_generic_name_is_importable_from_this_package(name: str):
    code = (
        f"import importlib.util as u; s = u.find_spec({name!r}); "
        "print(s and (s.origin, list(s.submodule_search_locations or [])))"
    )
    assert str(ROOT) not in in_a_clean_interpreter(code)


def test_the_installed_package_is_this_folder():
    code = "import tokenlabel; print(tokenlabel.__file__, tokenlabel.__version__)"
    file, version = in_a_clean_interpreter(code).split()
    assert Path(file).resolve() == (ROOT / "__init__.py").resolve()
    assert version.count(".") == 2


def test_every_command_exists_and_answers_help_without_loading_torch():
    scripts = PYPROJECT["project"]["scripts"]
    targets = {tuple(target.split(":")) for target in scripts.values()}
    assert {module for module, _ in targets} == {"tokenlabel.cli"}
    names = sorted(function for _, function in targets)
    code = (
        "import sys, tokenlabel.cli as cli\n"
        f"for name in {names}:\n"
        "    getattr(cli, name).main(['--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'timm', 'numpy', 'nvidia.dali'} & set(sys.modules)))"
    )
    assert in_a_clean_interpreter(code).splitlines()[-1] == "[]"
