"""`-d FOLDER`: a folder of class folders is split once, by the rules of `data new`, and every run has this split."""

import io
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import yaml
from conftest import Cli
from test_data_verify import picture

import tailtune
from tailtune.datasets.commands.result_files import plain_name
from tailtune.main import main

QUICK = "-m tiny_clip pretrained=none max_steps=2 batch_size=8 init_head=none"


def images(folder: Path, classes: dict[str, int], first: int = 0) -> None:
    """Pictures of some classes, all of them different."""
    for name, count in classes.items():
        for number in range(count):
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(first := first + 1, 16).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of ten and five images, in a folder whose name has a dot."""
    images(tmp_path / "my.birds", {"owl": 10, "wren": 5})
    return tmp_path / "my.birds"


def test_a_folder_is_trained_on_and_its_split_remains(folder: Path, launch: Cli) -> None:
    done = launch(f"-d {folder} {QUICK}")
    assert done.returncode == 0, done.stderr
    assert "output/my_birds_data: 2 classes" in done.stdout and "test: 3 images" in done.stdout
    (run,) = Path("output").glob("my_birds_tiny_clip*")
    config = yaml.safe_load(Path("output/my_birds_data/my_birds.yaml").read_text())
    assert (config["root"], config["test_list"]) == (str(folder), "test.txt")
    before = Path("output/my_birds_data/test.txt").read_text()
    assert len(before.splitlines()) == 3

    images(folder, {"owl": 12}, first=100)  # two more, and others in place of those that were there
    again = launch(f"-d {folder}/ {QUICK} lr=0.3")
    assert again.returncode == 0 and "the split of output/my_birds_data is used" in again.stdout
    assert Path("output/my_birds_data/test.txt").read_text() == before
    assert len(list(Path("output").glob("my_birds_tiny_clip*"))) == 2 and run.is_dir()


def test_folders_whose_names_are_in_other_scripts(tmp_path: Path, launch: Cli) -> None:
    """Each has a name of its own, so they share no folder."""
    for first, name in ((0, "鳥.2020"), (50, "花.2020")):
        images(tmp_path / name, {"owl": 5, "wren": 5}, first)
        done = launch(f"-d {name} {QUICK}")
        assert done.returncode == 0, done.stderr
    made = {path.name.partition("_2020")[0] for path in Path("output").iterdir()}
    assert made == {"鳥", "花"} and Path("output/鳥_2020_data/鳥_2020.yaml").is_file()
    assert plain_name("Müll er/…") == "Müll_er" and plain_name("…") == "data"


def test_python_takes_a_folder_as_the_command_does(folder: Path, launch: Cli) -> None:
    options = {"pretrained": None, "max_steps": 2, "batch_size": 8, "init_head": None}
    net = tailtune.build_model("tiny_clip", folder, pretrained=None, init_head=None)
    assert net.head.get_parameter("weight").shape[0] == 2 and not Path("output").exists()
    with pytest.raises(tailtune.UserError, match="train: unknown option 'lrr'"):
        tailtune.train(folder, "tiny_clip", **options, lrr=1)
    assert not Path("output").exists(), "wrong words are refused before the split"
    run = tailtune.train(folder, "tiny_clip", **options)
    assert len(Path("output/my_birds_data/test.txt").read_text().splitlines()) == 3
    assert f"the result of {run.folder / 'metrics.json'}" in launch(f"-d {folder} {QUICK}").stdout


def test_a_dry_run_writes_nothing(folder: Path, launch: Cli) -> None:
    done = launch(f"-d {folder} {QUICK} --dry-run")
    assert done.returncode == 0, done.stderr
    assert "would be made, not written: output/my_birds_data: 2 classes" in done.stdout
    assert not Path("output").exists()


@pytest.mark.parametrize("has_test", [False, True])
def test_a_folder_with_train(has_test: bool, tmp_path: Path, launch: Cli) -> None:
    """A folder test beside it is the test split; without one, images are held out. A finished run is shown again."""
    images(tmp_path / "birds/train", {"owl": 10, "wren": 5})
    if has_test:
        images(tmp_path / "birds/test", {"owl": 2, "wren": 2}, first=50)
    done = launch(f"-d birds {QUICK}")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(Path("output/birds_data/birds.yaml").read_text())
    expected = ("ImageFolder", tmp_path / "birds") if has_test else ("ImageList", tmp_path / "birds/train")
    assert (config["dataset"], config["root"]) == (expected[0], str(expected[1]))
    assert f"{4 if has_test else 3} test images" in done.stdout
    again = launch(f"-d birds {QUICK}")
    assert again.returncode == 0 and "finished before" in again.stdout


def test_a_folder_val_without_test(tmp_path: Path, launch: Cli) -> None:
    images(tmp_path / "birds/train", {"owl": 5, "wren": 5})
    images(tmp_path / "birds/val", {"owl": 2, "wren": 2}, first=50)
    assert "note: birds/val is not read" in launch(f"-d birds {QUICK} --dry-run").stdout


def test_another_folder_of_that_name_is_refused(folder: Path, tmp_path: Path, launch: Cli) -> None:
    assert launch(f"-d {folder} {QUICK}").returncode == 0
    images(tmp_path / "other/my.birds", {"owl": 3, "wren": 3})
    done = launch(f"-d other/my.birds {QUICK}")
    assert done.returncode == 2 and f"holds the split of {folder}" in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_without_classes_is_one_line(tmp_path: Path, launch: Cli) -> None:
    (tmp_path / "empty").mkdir()
    done = launch(f"-d empty {QUICK}")
    assert done.returncode == 2 and "empty" in done.stderr and done.stderr.count("\n") == 1
    assert not Path("output").exists()


@pytest.mark.parametrize("wrong", ["lrr=1", "lr=fast", "seed"])
def test_wrong_words_are_refused_before_the_split(wrong: str, folder: Path, launch: Cli) -> None:
    done = launch(f"-d {folder} {QUICK} {wrong}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not Path("output").exists()


def test_several_processes_do_not_split(folder: Path, launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailtune.datasets.commands.folder_config.world_size", lambda: 2)
    done = launch(f"-d {folder} {QUICK}")
    assert done.returncode == 2 and "data new" in done.stderr and not Path("output").exists()


def test_a_run_is_exported_without_its_images(folder: Path, launch: Cli) -> None:
    assert launch(f"-d {folder} {QUICK} output_dir run").returncode == 0
    folder.rename(folder.with_name("elsewhere"))
    done = launch("export run hub")
    assert done.returncode == 0, done.stderr
    assert "class_counts" in Path("output/run/export/hub/facts.json").read_text()
    done = launch(f"-d {folder} {QUICK}")
    assert (done.returncode, done.stdout) == (2, "") and "give the path of a YAML file or of a folder" in done.stderr


def test_a_folder_that_holds_the_outputs(folder: Path, launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = launch(f"-d . {QUICK}")
    assert done.returncode == 2 and "start the command in another folder" in done.stderr, done.stderr
    assert not Path("output").exists()


def test_a_command_to_copy_is_quoted(tmp_path: Path, launch: Cli) -> None:
    images(tmp_path / "a/our birds", {"owl": 3, "wren": 3})
    images(tmp_path / "our birds", {"owl": 3, "wren": 3})
    assert main(["-d", "a/our birds", *QUICK.split()]) == 0
    assert "data new 'our birds' --output FOLDER`" in error_of("-d", "our birds", *QUICK.split())
    assert "data new 'our birds'` makes" in error_of("data", "verify", "our birds")


def error_of(*words: str) -> str:
    """The line of a command whose words may hold blanks."""
    with redirect_stderr(io.StringIO()) as errors:
        assert main(words) == 2
    return errors.getvalue()


def test_an_image_that_begins_well(folder: Path, launch: Cli) -> None:
    """Only decoding it finds the damage; the message says what to do."""
    for image in folder.glob("owl/*.png"):
        image.write_bytes(image.read_bytes()[:-30])
    done = launch(f"-d {folder} {QUICK}")
    assert done.returncode == 2 and "on_bad_image skip" in done.stderr and len(done.stderr.splitlines()) == 1
