"""The commands, examples and links of the README and of the pages are right, and the generated list is current."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Cli
from mkdocs.exceptions import PluginError
from PIL import Image
from tiers import slow_except

from tailtune.configs import load_configs
from tailtune.configs.lift_plus_words import names, translated
from tailtune.datasets.build_data import build_info
from tailtune.main import split_arguments
from tailtune.models import resolve
from tailtune.scripts.make_model_list import FILE, render
from tailtune.scripts.mkdocs_hooks import on_post_page
from tailtune.trainers.config_checks import check
from tailtune.trainers.option_schema import declared

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")), ROOT / "models/tiny_clip/README.md"]
FOR_USERS = [DOCS / f"{name}.md" for name in ("quickstart", "data", "training", "evaluating", "exports", "predicting")]
"""Pages whose commands are run as written, where they need no download."""
CONFIGS = [*names("data").values(), *names("model").values()]


def commands(text: str) -> list[str]:
    """What stands behind `main.py` with a data and a model config, comments left out."""
    found = re.findall(r"main\.py +(-d [^#\n`|]+)", text)
    found = [each for each in found if "/" not in each.split()[1]]  # a folder, which the reader has
    return sorted({each.strip() for each in found if "DATA" not in each and ".yaml" not in each and "…" not in each})


OF_PAGES, OF_CONFIGS = (
    {command for path in paths for command in commands(path.read_text(encoding="utf-8"))}
    for paths in ([page for page in PAGES if page.name != "contributing.md"], CONFIGS)
)
"""Commands. Those of contributing.md name parts that the reader is to write; test_contributing.py writes them."""


OF_README = sorted(
    {command for page in (ROOT / "README.md", *FOR_USERS) for command in commands(page.read_text("utf-8"))}
)


def test_the_options_of_the_docs_are_options() -> None:
    for command in sorted(OF_PAGES | OF_CONFIGS):
        words = shlex.split(command.replace("--dry-run", ""))
        flags, pairs = split_arguments(words)
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        load_configs(given["-d"], *translated(given.get("-b"), given["-m"], pairs), declared())


@pytest.mark.parametrize("command", slow_except(OF_README, sorted(OF_PAGES | OF_CONFIGS)))
def test_a_command_of_the_docs_is_accepted(command: str) -> None:
    """By default those of the README and of the pages for users; tests/test_cli.py builds every config."""
    words = shlex.split(command.replace("--dry-run", ""))
    flags, pairs = split_arguments(words)
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    check(load_configs(given["-d"], *translated(given.get("-b"), given["-m"], pairs), declared())[-1])


def test_the_examples_of_own_data_work(tmp_path: Path) -> None:
    """Both YAML snippets of the page, with their root pointed at a handful of images; the README has the first one."""
    for split, label, number in [(s, k, i) for s in ("train", "test") for k in ("owl", "wren") for i in range(14)]:
        path = tmp_path / split / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    for split in ("train", "test"):
        lines = [
            f"{p.relative_to(tmp_path)} {['owl', 'wren'].index(p.parent.name)}" for p in tmp_path.glob(f"{split}/*/*")
        ]
        (tmp_path / f"{split}.txt").write_text("\n".join(sorted(lines)))
    (tmp_path / "classnames.txt").write_text("owl\nwren\n")
    snippets = re.findall(r"```yaml\n(.*?)```", (DOCS / "data.md").read_text(encoding="utf-8"), re.S)
    (of_readme,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert len(snippets) == 2
    assert yaml.safe_load(of_readme) == yaml.safe_load(snippets[0])
    for number, snippet in enumerate(snippets):
        text = re.sub(r"root: \S+", f"root: {tmp_path}", snippet).replace("imb_factor: 0.01", "imb_factor: 0.1")
        if "ImageFolder" in text:
            (tmp_path / "test").rename(tmp_path / "elsewhere")  # the snippet holds a test split out
        (tmp_path / f"{number}.yaml").write_text(text)
        (cfg,) = load_configs(str(tmp_path / f"{number}.yaml"), "tiny_clip_peft", [], declared())
        info = build_info(resolve(cfg))
        assert info.class_names == ("owl", "wren")
        assert info.class_counts.tolist() == ([4, 4] if "ImageFolder" in text else [14, 1])
        if "ImageFolder" in text:
            (tmp_path / "elsewhere").rename(tmp_path / "test")


def blocks(page: Path, language: str) -> list[str]:
    """The code of a page in a language, in its order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def parts(block: str) -> Iterator[str]:
    """A block of shell commands as its `python main.py …` lines, and what is between them."""
    between: list[str] = []
    for line in block.splitlines():
        if line.startswith("python main.py"):
            if between:
                yield "\n".join(between)
            between = []
            yield line
        else:
            between.append(line)


@pytest.mark.slow
@pytest.mark.parametrize("page", FOR_USERS, ids=lambda page: page.stem)
def test_the_commands_and_the_code_of_a_page_run_as_written(page: Path, launch: Cli, tmp_path: Path) -> None:
    """Those on embedded or generated data, in the order of the page, after the demo."""
    assert launch("-d digits_lt -m tiny_clip_peft").returncode == 0
    run = 0
    for block in blocks(page, "bash"):
        if "-d digits_lt" not in block and "-d my_images.yaml" not in block:
            continue
        for part in parts(block):
            words = shlex.split(part, comments=True)
            if words[:2] == ["python", "main.py"]:
                done = launch(*words[2:])
                assert done.returncode == 0, f"{part}\n{done.stderr}"
                run += 1
            else:
                script = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", part, flags=re.M)
                subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True)
    assert run
    for code in blocks(page, "python"):
        exec(code, {})


@pytest.mark.slow
def test_the_code_of_the_page_of_the_api_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks(DOCS / "api.md", "python"):
        exec(code, names)


def test_the_list_of_model_configs_is_current() -> None:
    """Otherwise: `make docs`."""
    assert FILE.read_text(encoding="utf-8") == render()


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://cdn.example/mermaid.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/a.css">',
        "<img alt='' src='http://example.org/a.png'>",
    ],
)
def test_a_page_that_loads_from_another_host_is_refused(tag: str) -> None:
    with pytest.raises(PluginError, match="another host"):
        on_post_page(output=f"<p>{tag}</p>")


def test_a_page_may_link_to_another_host() -> None:
    page = '<link href="assets/a.css"><a class="x" href="https://arxiv.org/abs/2309.10019">LIFT</a>'
    assert on_post_page(output=page) == page


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_config_says_what_it_is() -> None:
    for path in CONFIGS:
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        assert first.startswith("# ") and 20 < len(first) < 120, path
        assert path.parent.name == "data" or any(f"-m {path.stem}" in line for line in rest), f"{path}: its command"
