"""Searches learning rate, dropout, freezing strategy, or any other key of a recipe, and exports the winner.

    python -m jobs.search --config RECIPE.yaml --space SPACE.yaml --name NAME [key.path=value ...]
    ray job submit --working-dir . -- python -m jobs.search --config RECIPE.yaml --space SPACE.yaml --name NAME

A trial is a training with some keys of the recipe replaced, drawn from the space (see `mmagent.space` for its file;
none: jobs/recipes/space.yaml). The recipe's own values are always the first trial. Trials take turns in worker groups
that stay (`jobs.lanes`), under Ray Tune (`jobs.trials`); those that fall behind end early. The winner has to beat the
recipe's own values by more than these deviate over three seeds, else they stay.

ROOT/search/NAME: search.yaml, trials.json, winner.json, evaluation.json (the test split, asked once), report.html, the
winner's bundle/, trials/ID (a run folder each) and seeds/. Ctrl-C ends it; the same command goes on.
"""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from jobs import cluster, track, watch
from jobs.train import user_errors
from mmagent import config as configs
from mmagent import space as spaces
from mmagent import storage
from mmagent.arguments import Parser
from mmagent.config import Config, ConfigError
from mmagent.shards import Dataset
from mmagent.space import Dimension, Sample, Space

if TYPE_CHECKING:
    from jobs.lanes import Job, Lanes
    from jobs.run import Run
    from jobs.trials import Stages, Trial
    from mmagent.targets import TaskInfo

SPACE = cluster.CHECKOUT / "jobs/recipes/space.yaml"
_HELD, _WINNER = "search.yaml", "winner.json"
_COSTS = "costs.json"  # of a trial
_TIMED = 15  # answers
_LOWER = ("loss", "nll", "brier", "ece", "mae", "rmse", "perplexity")  # the better
_CHECKED = ("model.", "freeze.", "data.", "train.micro_batch", "train.accumulation")  # what may make no model


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("jobs.search", __doc__, keys=configs.keys())
    parser.add_argument("--config", required=True, type=Path, help="the recipe")
    parser.add_argument("--space", type=Path, default=SPACE, help="the search space (default: jobs/recipes/space.yaml)")
    parser.add_argument("--name", required=True, help="the search's name; given again, the search goes on")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="in place of what the recipe says")
    args = parser.parse_args(argv)
    try:
        return search(args.config, args.space, args.name, args.overrides)
    except _errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        return 130


def _errors() -> tuple[type[BaseException], ...]:
    if "jobs.lanes" not in sys.modules:
        return user_errors()
    from jobs.lanes import LaneError

    return user_errors(LaneError)


def search(recipe: Path, space_file: Path, name: str, overrides: Sequence[str]) -> int:
    """Runs the search and exports the winner; the exit status."""
    config, space = configs.load(recipe, overrides), spaces.load(space_file)
    fixed = {**space.set, **({"train.max_steps": int(space.most)} if space.most and space.unit == "steps" else {})}
    track.check(config.track)
    base, dims = configs.override(config, fixed), spaces.dimensions(space)
    folder = storage.fetched(storage.folder("search", name))
    Dataset.open(storage.folder("data", config.data.name))
    _check_space(base, space, dims)
    if _held(folder, base, space) and (folder / _WINNER).exists():
        with track.following(base.track, folder):  # what a server does not have yet
            print(f"the search {name!r} is finished: {_told(folder)}\nanother --name searches anew")
        return 0
    cluster.connect()
    from jobs import room  # brings Ray, which reads its environment when it is imported
    from jobs.lock import locked

    room.check_alone(base)
    with locked(folder), track.following(base.track, folder):
        return _search(base, space, dims, folder)


def _search(base: Config, space: Space, dims: Sequence[Dimension], folder: Path) -> int:
    from jobs import trials
    from jobs.lanes import Lanes

    began = time.monotonic()

    def tell(line: str) -> None:
        print(f"[{_clock(time.monotonic() - began)}] {line}", flush=True)

    # What is wrong with the recipe, or with what the space may make of it, is said before the first trial.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".check-") as place:
        first, stages = _checked(base, space, dims, Path(place))
    concurrent = min(_room(base, space), space.trials)
    storage.publish(folder / _HELD, _written(base, space))  # not before: a mistake that is mended may keep its name
    print(
        f"search {folder.name}: {space.trials} trials of up to {stages.most:g} {stages.unit}, {concurrent} at a time",
        flush=True,
    )
    with Lanes(base, folder / "lanes", concurrent) as groups, trials.quiet():
        make = functools.partial(job, storage.variables(), base, stages, space.method)
        done = trials.run(
            make, folder, space, dims, [first], groups.desk, stages=stages, trials=space.trials,
            concurrent=concurrent, seed=base.seed, metric=_metric(space), tell=tell,
        )  # fmt: skip
        if any(each.state == "cut" for each in done) or len(done) < space.trials:
            raise KeyboardInterrupt
        storage.publish_json(folder / "trials.json", [_as_json(each, folder) for each in done])
        print(_table(done))
        scored = [each for each in done if each.quality is not None]
        if not scored:
            raise ConfigError(f"no trial came to its first validation; their errors are in {folder / 'trials.json'}")
        verdict = _verdict(base, space, stages, first, done, folder, groups, tell)
        done = [trials.carried_on(folder, done[0], stages, _metric(space)), *done[1:]]
        if space.cost == "latency_ms":
            _time(base, done, folder, groups, tell)
        tell(f"exporting {verdict['trial']}")
        home, config = folder / verdict["run"], configs.override(base, verdict["sample"])
        run = _export(config, home, folder.name, folder / "bundle", groups)
    _finish(run, space, dims, stages, done, verdict, folder)
    _tidy(folder, home)
    print(f"winner  {_told(folder)}\nbundle  {folder / 'bundle'}\nreport  {folder / 'report.html'}")
    return 0


# -- before the first trial --------------------------------------------------------------------------------------------


def _check_space(base: Config, space: Space, dims: Sequence[Dimension]) -> None:
    """What can be told without Ray and the model."""
    for sample in spaces.corners(dims):
        try:
            configs.override(base, sample)
        except ConfigError as error:
            raise ConfigError(f"the space cannot run, {spaces.short(sample)}: {error}") from error
    if space.unit == "seconds" and space.most is None:
        raise ConfigError("unit: seconds wants most: the seconds of training that a trial may take")
    if space.method == "population":
        changed = spaces.mutable(dims)
        if not changed:
            kinds = ", ".join(spaces.MUTABLE)
            raise ConfigError(
                f"method: population changes numbers while a trial trains, but the space has none: a {kinds} of a "
                "learning rate, weight decay, dropout or augmentation is wanted"
            )
        for each in changed:
            if configs.value(base, each.key) is None:
                raise ConfigError(
                    f"method: population changes {each.key} by factors, but the recipe leaves it open: give it a number"
                )
        if space.trials < 4:
            raise ConfigError(
                f"method: population wants 4 trials or more, of which a quarter changes; got {space.trials}"
            )


def _held(folder: Path, base: Config, space: Space) -> bool:
    """Whether there is a search of this name, begun with the same recipe and space.

    Raises:
        ConfigError: it began with others.
    """
    file = folder / _HELD
    if not file.exists():
        return False
    if yaml.safe_load(file.read_text()) != yaml.safe_load(_written(base, space)):
        state = "is finished" if (folder / _WINNER).exists() else "has begun"
        raise ConfigError(
            f"a search called {folder.name!r} {state}, with another recipe or space ({file}): give another --name"
        )
    return True


def _written(base: Config, space: Space) -> str:
    recipe = base.model_dump(mode="json", exclude={"track"})  # where figures go is no part of what is compared
    held = {"space": space.model_dump(mode="json"), "recipe": recipe}
    return yaml.safe_dump(held, sort_keys=False)


def _checked(base: Config, space: Space, dims: Sequence[Dimension], place: Path) -> tuple[Sample, Stages]:
    """The recipe's own sample, and how time is counted.

    Raises:
        ConfigError: something that the space may draw makes no run, or a metric that there is not.
    """
    from jobs import run
    from jobs.trials import Stages

    made = run.prepare(base, place / "own", export=False)
    for line in made.notes:
        print(line, flush=True)
    _check_metric(space, made.plan.tasks)
    own = spaces.own(made.config, dims)
    for number, sample in enumerate(spaces.corners(dims)):
        if not any(key.startswith(_CHECKED) for key in sample):
            continue
        try:
            run.prepare(configs.override(base, sample), place / str(number), export=False)
        except (run.RunError, ConfigError, ValueError) as error:
            raise ConfigError(f"the space cannot run, {spaces.short(sample)}: {error}") from error
    most = space.most if space.most and space.unit == "seconds" else float(made.plan.total_steps)
    grace = space.grace or max(1.0, most / (16 if space.method == "population" else space.reduction**2))
    if grace > most:
        raise ConfigError(f"grace={grace:g} {space.unit}, but a trial has {most:g}")
    if space.method != "population" and space.scheduler == "hyperband" and grace * space.reduction > most:
        raise ConfigError(
            f"hyperband would stop no trial: after grace={grace:g} {space.unit} the next stage is at "
            f"{grace * space.reduction:g}, and a trial has {most:g}; give a smaller grace or reduction"
        )
    return own, Stages(space.unit, grace, most, space.reduction)


def _check_metric(space: Space, infos: Mapping[str, TaskInfo]) -> None:
    from mmagent.tasks import make_all

    tasks = make_all(infos)
    known = ["score", "loss"]
    for name, task in tasks.items():
        known += [f"{name}/{each}" if len(tasks) > 1 else each for each in task.measures]
    # Behind the score may stand a kind of input: accuracy/text+image.
    if space.metric and not {space.metric, space.metric.rpartition("/")[0]} & set(known):
        raise ConfigError(f"metric={space.metric} is not reported: there are {', '.join(known)}")


def _room(base: Config, space: Space) -> int:
    """How many trials at a time."""
    from jobs import workers

    room = workers.room(base)
    return min(space.concurrent, room) if space.concurrent else room


def _metric(space: Space) -> tuple[str, bool]:
    name = space.metric or ""
    return name, not any(part in _LOWER for part in name.split("/"))


# -- trials ------------------------------------------------------------------------------------------------------------


def job(
    root: Mapping[str, str], base: Config, stages: Stages, method: str, sample: Sample, place: Path, name: str
) -> Job:
    """A trial's work: the training of a sample, in a folder of its own, validated at each stage too.

    Args:
        root: `storage.variables` of the command.
    """
    from jobs import run

    storage.use(root)
    made = run.prepare(configs.override(base, sample), place, export=False)
    trained = {"trained_parameters": sum(part.trained for part in made.plan.parts)}
    storage.publish_json(place / _COSTS, {**_costs_of(place), **trained})
    return _job_of(made, name, stages=stages.steps(method, made.plan.total_steps))


def _costs_of(place: Path) -> dict[str, Any]:
    file = place / _COSTS
    return json.loads(file.read_text()) if file.exists() else {}


def _job_of(made: Run, name: str, **changed: Any) -> Job:
    from jobs import run, states
    from jobs.lanes import Job
    from jobs.loop import STOP_FILE, train

    plan = replace(made.plan, **changed)
    plan = replace(plan, features=states.keep(plan, made.dataset, (made.folder / STOP_FILE).exists))
    return Job(name, functools.partial(train, plan=plan), run.streams(plan, made.dataset), made.config, made.folder)


def _verdict(
    base: Config, space: Space, stages: Stages, own: Sample, done: Sequence[Trial], folder: Path, groups: Lanes,
    tell: Any,
) -> dict[str, Any]:  # fmt: skip
    """Who wins: the best trial, where it beats the recipe's own values by more than these deviate over seeds."""
    from jobs import trials

    reached = {each.id: each.quality for each in done if each.quality is not None}
    best = max((each for each in done if each.id in reached), key=lambda each: (reached[each.id], -each.step))
    found: dict[str, Any] = {
        "trial": best.id,
        "run": f"trials/{best.id}",
        "sample": dict(best.sample),
        "score": reached[best.id],
    }
    # A population's first trial has other values by now.
    first = done[0] if space.method != "population" and done[0].quality is not None else None
    if first is not None and (best.id == first.id or space.seeds == 1):
        alone: dict[str, Any] = {"scores": [first.quality], "mean": first.quality, "deviation": None}
        why = "no trial did better than the recipe's own values" if best.id == first.id else ""
        return {**found, "own": alone, "why": why}
    tell(f"{best.id} is ahead: the recipe's own values, over {space.seeds} seeds")
    places, jobs = [], []
    for index in range(space.seeds):
        begun = first if index == 0 else None
        place = folder / (f"seeds/s{index}" if begun is None else f"trials/{begun.id}")
        places.append(place)
        if not _ended(place):
            sample = {**own, "seed": base.seed + index}
            name = f"seed{index}" if begun is None else begun.id
            jobs.append(job(storage.variables(), base, stages, space.method, sample, place, f"{name}#seed"))

    def hear(name: str, report: Mapping[str, float]) -> None:
        tell(f"{name}  step {report['step']:.0f}  {report['score']:.4g}")
        if first is not None and name == first.id:  # it was stopped, and goes on
            trials.note(folder, first, report)

    if jobs:
        groups.run(jobs, hear)
    scores = [max(trials.quality(row, _metric(space)) for row in _validations(place)) for place in places]
    mean, deviation = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
    alone = {"scores": scores, "mean": mean, "deviation": deviation if len(scores) > 1 else None}
    margin = reached[best.id] - mean
    if margin > deviation:
        why = f"{best.id} is {margin:.4g} above the mean of the recipe's own values, which deviate by {deviation:.4g}"
        return {**found, "own": alone, "why": why}
    why = (
        f"{best.id} reached {reached[best.id]:.4g}, {margin:+.4g} to the mean of the recipe's own values over "
        f"{space.seeds} seeds, which deviate by {deviation:.4g}: that is no gain, and they stay"
    )
    name = first.id if first is not None else "recipe"
    kept = {"trial": name, "run": str(places[0].relative_to(folder)), "sample": dict(own), "score": scores[0]}
    return {**kept, "own": alone, "why": why, "best": {"trial": best.id, "score": reached[best.id]}}


def _validations(place: Path) -> list[dict[str, Any]]:
    return [row for row in watch.whole_lines(place / "metrics.jsonl") if row["kind"] == "validation"]


def _ended(place: Path) -> bool:
    """Whether a run of the recipe's own values came to its last step."""
    file = place / "metrics.jsonl"
    if not file.exists():
        return False
    rows = [row for row in watch.whole_lines(file) if row["kind"] == "train"]
    return bool(rows) and rows[-1]["step"] >= rows[-1]["total_steps"]


def _export(config: Config, place: Path, name: str, bundle: Path, groups: Lanes) -> Run:
    """The best checkpoint of the trial in `place` as a bundle; its run."""
    from jobs import run

    made = run.prepare(config, place, bundle=bundle, name=name)
    made = made.at_its_end()
    if not made.exported:
        groups.run([_job_of(made, f"{place.name}#export")], lambda *_: None)
    return made


def _time(base: Config, done: Sequence[Trial], folder: Path, groups: Lanes, tell: Any) -> None:
    """Notes what an answer of each trial's bundle takes, one at a time: the middle one of several."""
    for each in done:
        place = folder / "trials" / each.id
        known = _costs_of(place)
        if each.quality is None or "latency_ms" in known:
            continue
        made = _export(configs.override(base, each.sample), place, each.id, place / "timed", groups)
        found = _latency_ms(place / "timed", made)
        shutil.rmtree(place / "timed")
        storage.publish_json(place / _COSTS, {**known, "latency_ms": found})
        tell(f"{each.id}  {found:.1f} ms an answer")


def _latency_ms(bundle: Path, made: Run) -> float:
    from mmagent import Predictor
    from mmagent.record import Record

    predictor = Predictor.load(bundle)
    row = next(made.dataset.read("validation")).slice(0, 1).to_pylist()[0]
    record, times = Record.from_row(row), []
    for _ in range(_TIMED):
        began = time.perf_counter()
        predictor.predict([record])
        times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times), 3)


# -- afterwards --------------------------------------------------------------------------------------------------------


def _finish(
    run: Run,
    space: Space,
    dims: Sequence[Dimension],
    stages: Stages,
    done: Sequence[Trial],
    verdict: dict[str, Any],
    folder: Path,
) -> None:
    """Asks the test split once, and writes what the search came to: winner.json last."""
    from jobs import proposing
    from mmagent import bundle as bundles
    from mmagent import contest, report

    history = [_as_json(each, folder) for each in done]
    storage.publish_json(folder / "trials.json", history)  # with all costs
    told = {"space": space.model_dump(mode="json"), "seed": run.config.seed, "verdict": verdict, "trials": history}
    bundles.add(folder / "bundle", {"search.json": json.dumps(told, indent=1) + "\n"})
    first = 1 / stages.budget
    known = [(each, contest.at_first(each, first)) for each in history]
    scores = [(each["reports"][0]["sample"], score) for each, score in known if score is not None]
    shutil.copyfile(run.folder / "metrics.jsonl", folder / "metrics.jsonl")
    sections = contest.sections(space, dims, history, verdict, first, proposing.importance(scores, dims))
    if not watch.evaluate_once(run, folder, sections):
        storage.publish(folder / "report.html", report.page(f"Search {folder.name}", "no test split", sections))
    note = {**verdict, "bundle": str(folder / "bundle")}
    storage.publish_json(folder / _WINNER, note)


def _tidy(folder: Path, winner: Path) -> None:
    """Takes away what only a search that goes on would read; the winner's checkpoints stay."""
    for place in (folder / "tune", folder / "lanes"):
        shutil.rmtree(place, ignore_errors=True)
    for place in (*folder.glob("trials/*"), *folder.glob("seeds/*")):
        if place != winner:
            shutil.rmtree(place / "checkpoints", ignore_errors=True)


def _told(folder: Path) -> str:
    note = json.loads((folder / _WINNER).read_text())
    why = f"; {note['why']}" if note["why"] else ""
    return f"{note['trial']}: {note['score']:.4g} on validation, {spaces.short(note['sample'])}{why}"


def _table(done: Sequence[Trial]) -> str:
    lines = ["", f"{'trial':8s}{'best':>10s}{'steps':>7s}{'seconds':>9s}  {'':8s}sample"]
    for each in sorted(done, key=lambda each: -(each.quality if each.quality is not None else -1e30)):
        best = f"{each.quality:.4g}" if each.quality is not None else "-"
        row = f"{each.id:8s}{best:>10s}{each.step:>7d}{each.seconds:>9.1f}  {each.state:8s}{spaces.short(each.sample)}"
        lines.append(f"{row}  {each.error or ''}".rstrip())
    return "\n".join(lines) + "\n"


def _as_json(trial: Trial, folder: Path) -> dict[str, Any]:
    return {
        "id": trial.id, "sample": dict(trial.sample), "quality": trial.quality, "step": trial.step,
        "state": trial.state, "error": trial.error, "seconds": trial.seconds,
        **_costs_of(folder / "trials" / trial.id), "reports": list(trial.reports),
    }  # fmt: skip


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main())
