"""Random combinations of data, model and options, tables' entries included: a dry run; small ones are run too."""

from collections.abc import Iterator

from hypothesis import strategies as st

from tailtune.configs import names
from tailtune.tests.fuzz.bench import SHORT, Bench
from tailtune.tests.fuzz.options import schema, sensible
from tailtune.tests.fuzz.promises import Finding, broken
from tailtune.tests.fuzz.runner import Outcome

SMALL_DATA = ("fake_lt", "digits_lt")
SMALL_MODELS = ("tiny_clip", "zstiny_clip", "resnet32")
HEAVY = {"backbone", "resolution", "after", "randaug_times", "num_workers", "dataset", "model_dir", "ensemble_runs"}
"""Keys left alone where the command is run: with them two steps may take long, for good reasons."""
Case = tuple[str, str, list[tuple[str, str]]]


def cases(bench: Bench) -> Iterator[Finding | None]:
    """One case is one combination, every second a small one, which is run if the dry run accepts it."""
    everything = st.tuples(
        st.sampled_from(sorted(names("data"))), st.sampled_from(sorted(names("model"))), _pairs(set())
    )
    little = [name for name in names("model") if name.startswith(SMALL_MODELS)]
    small = st.tuples(st.sampled_from(SMALL_DATA), st.sampled_from(little), _pairs(HEAVY))
    for one, other in zip(bench.draws(everything), bench.draws(small), strict=False):
        yield _case(bench, one, runs=False)
        yield _case(bench, other, runs=True)


def _pairs(without: set[str]) -> st.SearchStrategy[list[tuple[str, str]]]:
    keys = [key for key in sorted(schema()) if key not in without and not sensible(key).is_empty]
    pair = st.sampled_from(keys).flatmap(lambda key: st.tuples(st.just(key), sensible(key)))
    return st.lists(pair, max_size=7, unique_by=lambda each: each[0])


def _case(bench: Bench, case: Case, runs: bool) -> Finding | None:
    found = broken(outcome := _run(bench, case, dry=True))
    if found is None and runs and outcome.code == 0:
        found = broken(_run(bench, case, dry=False))
    return _shortest(bench, case, found, dry="--dry-run" in found.command) if found else None


def _shortest(bench: Bench, case: Case, found: Finding, dry: bool) -> Finding:
    """The same finding with as few pairs as show it."""
    data, model, pairs = case
    if found.promise == "c":
        return found  # it would take minutes
    for pair in list(pairs):
        fewer = [each for each in pairs if each is not pair]
        again = broken(_run(bench, (data, model, fewer), dry))
        if again and again.what == found.what:
            pairs, found = fewer, again
    return found


def _run(bench: Bench, case: Case, dry: bool) -> Outcome:
    data, model, pairs = case
    short = (
        ["--dry-run"]
        if dry
        else [*SHORT, "num_epochs", "1", "max_test_images", "40", "num_workers", "0", "output_dir", "run"]
    )
    with bench.fresh() as folder:
        return bench.run(["-d", data, "-m", model, *short, *(word for pair in pairs for word in pair)], folder)
