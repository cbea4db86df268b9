"""Hostile and ordinary values of every option, on the command line and in YAML: a dry run, then a short run."""

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml
from hypothesis import strategies as st

from tailtune.configs import names
from tailtune.configs.config_files import FOLDER
from tailtune.tests.fuzz.bench import SHORT, TINY, Bench
from tailtune.tests.fuzz.options import hostile, schema
from tailtune.tests.fuzz.promises import Finding, broken
from tailtune.tests.fuzz.runner import GIGA, Limits, Outcome, run

AMOUNTS = {
    "num_epochs",
    "max_steps",
    "randaug_times",
    "adapt_epochs",
    "dirichlet_trials",
    "dirmixe.draws",
    "num_workers",
}
"""Keys whose large values mean much work, which is what was asked for."""
RUNS = 3
"""One of so many values that the dry run accepts is run."""


def cases(bench: Bench) -> Iterator[Finding | None]:
    """One case is one value of one key: in both places, and one in `RUNS` of the accepted ones run."""
    pairs = st.sampled_from(sorted(schema())).flatmap(lambda key: st.tuples(st.just(key), hostile(key)))
    for key, text in bench.draws(pairs):
        with bench.fresh() as folder:
            yield _case(bench, folder, key, text)


def _case(bench: Bench, folder: Path, key: str, text: str) -> Finding | None:
    hazards(folder)
    given = by_words(bench, folder, key, text) if possible(text) else None
    if given and (found := broken(given)):
        return found
    (folder / "my.yaml").write_bytes(yaml_with(key, text))
    written = bench.run(["-d", "my.yaml", *words(key)[2:], "--dry-run"], folder)
    if found := broken(written, story=f"my.yaml is fake_lt.yaml and a line {key}: {text[:400]!r}"):
        return found
    if given is None or given.code:
        return None
    if written.code == 0 and text.strip() and key not in set_elsewhere(key):
        one, other = resolved(given, key), resolved(written, key)
        if one != other and not isinstance(one, str):  # YAML may read text without quotes as a number
            seen = f"{one!r} on the command line, {other!r} in YAML"
            return Finding("b", "one text, two values: on the command line and in YAML", f"{key} {text!r}", seen)
    if key in AMOUNTS or bench.rng.randrange(RUNS) or (key == "output_dir" and (text[:1] == "/" or ".." in text)):
        return None
    folder_words = ["output_dir", "run"] if key != "output_dir" else []
    # RIDE's teacher, of six experts, and its student take 1.0 GiB with the shipped values, at any batch size.
    limits = Limits(bench.limits.seconds, 2 * GIGA) if "." in key else bench.limits
    command = [*words(key), *SHORT, "num_epochs", "1", *folder_words, key, text]
    return broken(run(command, folder, limits), limits=limits)


def by_words(bench: Bench, folder: Path, key: str, text: str) -> Outcome:
    return bench.run([*words(key), "--dry-run", key, text], folder)


def possible(text: str) -> bool:
    """Whether the system can hand this text to a program as one of its words."""
    return "\0" not in text and all(not "\ud800" <= char <= "\udfff" or "\udc80" <= char <= "\udcff" for char in text)


def yaml_with(key: str, text: str) -> bytes:
    lines = (FOLDER / "data" / "fake_lt.yaml").read_text() + f"{key}: {text}\n"
    return lines.encode(errors="surrogatepass" if not possible(text) else "surrogateescape")


def words(key: str) -> list[str]:
    """A command on which the key has a meaning: a method's own option needs that method."""
    return [*TINY[:3], _model_of(key.partition(".")[0]), *TINY[4:]] if "." in key else TINY


def set_elsewhere(key: str) -> set[str]:
    """Keys that the command or the model's file sets, which beat the data's."""
    command = words(key)
    return {*command[4::2], *yaml.safe_load(names("model")[command[3]].read_text())}


@cache
def _model_of(method: str) -> str:
    """A shipped model config with the method, a small one."""
    found = [name for name, path in names("model").items() if f"\nmethod: {method}\n" in path.read_text()]
    small = [name for name in found if name.startswith(("tiny", "resnet32"))]
    return min(small or found or [TINY[3]], key=lambda name: (not name.startswith("tiny"), len(name)))


def resolved(outcome: Outcome, key: str) -> object:
    """The value of a key as the last line of a dry run says it."""
    config = json.loads(outcome.stdout.splitlines()[-1])["config"]
    return config.get(key)


def hazards(folder: Path) -> None:
    """Things that a path may turn out to be."""
    os.mkfifo(folder / "fifo")
    (folder / "empty").touch()
    with (folder / "sparse").open("wb") as file:
        file.truncate(2**36)
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "binary").write_bytes(bytes(range(256)) * 40)
    (folder / "prior.json").write_text(json.dumps([0.1] * 10))
