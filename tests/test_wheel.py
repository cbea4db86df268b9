"""The package that `pip install` makes of the checkout: what the wheel holds, and that it runs from another folder."""

import email
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from conftest import ROOT, Cli, offline
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

import tailtune
from tailtune.configs import program
from tailtune.trainers.runs import metrics_file
from tailtune.trainers.serve_command import PACKAGES as PACKAGES_TO_SERVE

PACKAGES = ("configs", "datasets", "models", "trainers")
MOST_BYTES = 12_000_000


def wheel_of(checkout: Path, folder: Path) -> Path:
    """The wheel of a checkout or of an unpacked source distribution, built without pip and network."""
    return Path(next(WheelBuilder(str(checkout)).build(directory=str(folder), versions=["standard"])))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel_of(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment with the package, inside the git repository of another project."""
    repository = tmp_path_factory.mktemp("repository")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(repository / "site")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "of another project"]):
        subprocess.run([*git, *words], check=True)
    return repository / "site"


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def requirements(name: str) -> set[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return {Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    about = f"tailtune-{tailtune.__version__}.dist-info"
    names = names_in(wheel)
    assert {name.partition("/")[0] for name in names} == {"tailtune", about}
    code = {path.relative_to(ROOT).as_posix() for folder in PACKAGES for path in (ROOT / folder).rglob("*")}
    code = {name for name in code if (ROOT / name).is_file() and "__pycache__" not in name}
    ours = {name.removeprefix("tailtune/") for name in names if name.startswith("tailtune/")}
    assert ours == {"__init__.py", "__main__.py", "main.py", *code}
    assert {"configs/data/counts/imagenet_lt.json", "models/tiny_clip/weights.safetensors"} <= ours
    assert len([name for name in ours if name.startswith("configs/model/")]) > 90
    assert wheel.stat().st_size < MOST_BYTES


def test_a_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    (archive,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"tailtune-{tailtune.__version__}"
    assert not {"tests", "docs", "output", ".venv"} & {path.name for path in unpacked.iterdir()}
    assert names_in(wheel_of(unpacked, tmp_path)) == names_in(wheel)


def test_an_editable_installation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be a copy of the files that does not follow the checkout."""
    with pytest.raises(SystemExit):
        next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["editable"]))
    assert "an editable installation is not possible: run python main.py in the checkout" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_the_package_says_about_itself(installed: Path) -> None:
    found = Distribution.at(next(installed.glob("*.dist-info")))
    about = email.message_from_string(found.read_text("METADATA") or "")
    assert (about["Name"], found.version) == ("tailtune", tailtune.__version__)
    assert [(entry.name, entry.value) for entry in found.entry_points] == [("tailtune", "tailtune:command")]
    needed = {each for each in map(Requirement, found.requires or []) if each.marker is None}
    listed = requirements("requirements-package.txt")
    assert needed == {Requirement(str(each).lower().replace("_", "-")) for each in listed}  # names as in an index
    tools = {each.name for each in requirements("requirements.txt")}
    assert {"pytest", "ruff", "mypy", "hatchling"} <= tools
    assert not tools & {each.name for each in needed}


def test_an_extra_has_the_packages_of_its_file(installed: Path) -> None:
    found = Distribution.at(next(installed.glob("*.dist-info")))
    assert {each.name for each in requirements("requirements-serve.txt")} == {*PACKAGES_TO_SERVE.values()}
    extras = {path.stem.removeprefix("requirements-"): path.name for path in ROOT.glob("requirements-*.txt")}
    del extras["package"]
    assert set(found.metadata.get_all("Provides-Extra") or []) == extras.keys() == {"parquet", "serve", "sweep"}
    for extra, file in extras.items():
        wanted = [Requirement(text) for text in found.requires or [] if f'extra == "{extra}"' in text.replace("'", '"')]
        assert {(each.name, each.specifier) for each in wanted} == {
            (each.name.lower(), each.specifier) for each in requirements(file)
        }


def test_the_changelog_has_the_version() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "docs" / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None and newest[1] == tailtune.__version__


def test_the_installed_package_runs_beside_other_packages(installed: Path, tmp_path: Path) -> None:
    """In the folder of a project that has a package `datasets` of its own, by the function of the console script."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("class Dataset: ...\nclass IterableDataset: ...\nMINE = 1\n")
    words = "-d fake_lt -m tiny_clip_peft max_steps 1 max_test_images 20 num_workers 0 output_dir run"
    code = (
        "import sys, datasets, tailtune\n"
        "print(datasets.MINE, tailtune.__file__, tailtune.__path__)\n"
        f"sys.argv = ['tailtune', *'{words}'.split()]\n"
        "tailtune.command()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=offline(PYTHONPATH=str(installed)), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"1 {installed / 'tailtune' / '__init__.py'} ['{installed / 'tailtune'}']"
    result = json.loads((tmp_path / "output" / "run" / "metrics.json").read_text())
    assert result["commit"] is None, "the repository around it is another project's"
    assert result["packages"]["tailtune"] == tailtune.__version__


def test_a_checkout_has_a_commit() -> None:
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", metrics_file.commit() or "")


def test_importing_the_package_leaves_other_folders_on_the_path(installed: Path) -> None:
    code = "import sys; path = list(sys.path); import tailtune; assert sys.path == path; print(tailtune.__version__)"
    for words in (["-c", code], ["-m", "tailtune", "--version"]):
        command = [sys.executable, *words]
        done = subprocess.run(
            command, cwd=installed.parent, env=offline(PYTHONPATH=str(installed)), capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split()[-1] == tailtune.__version__


# --- the names of the command ----------------------------------------------------------------------------------------


def test_the_version(launch: Cli) -> None:
    done = launch("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tailtune {tailtune.__version__}\n", "")


@pytest.mark.parametrize(
    ("started", "name", "target"),
    [
        (["python", "main.py"], "python main.py", "main.py"),
        (["python", "-u", "/a/main.py"], "python main.py", "main.py"),
        (["python", "/venv/bin/tailtune"], "tailtune", "-m tailtune"),
        (["python", r"C:\venv\Scripts\tailtune.exe".replace("\\", "/")], "tailtune", "-m tailtune"),
        (["python", "-u", "-m", "tailtune"], "python -m tailtune", "-m tailtune"),
        (["python", "-m", "ipykernel_launcher"], "python main.py", "main.py"),
    ],
)
def test_the_command_that_was_typed(
    monkeypatch: pytest.MonkeyPatch, started: list[str], name: str, target: str
) -> None:
    arguments = ["-d", "fake_lt", "-m", "tiny_clip"]
    monkeypatch.setattr(sys, "orig_argv", [*started, *arguments])
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    assert (program.program(), program.launch_target()) == (name, target)


def test_the_command_of_an_installed_package_in_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "IN_CHECKOUT", False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ipykernel_launcher"])
    monkeypatch.setattr(sys, "argv", ["launcher.py"])
    assert program.program() == "tailtune"


def test_usage_and_errors_name_the_command(
    monkeypatch: pytest.MonkeyPatch, launch: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "/venv/bin/tailtune"])
    monkeypatch.setattr(sys, "argv", ["tailtune"])
    assert launch("--lst").stderr == "error: unrecognized arguments: --lst; see tailtune --help\n"
    with pytest.raises(SystemExit):
        launch("--help")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: tailtune -d DATA -m MODEL [KEY VALUE ...]")
    assert "  tailtune -d digits_lt" in shown and "accelerate launch -m tailtune" in shown and "main.py" not in shown
