"""Where runs are written down beside their folders: MLflow, and Weights & Biases. The only home of both packages."""

from __future__ import annotations

import math
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmagent import storage

_BATCH = 90  # parameters, tags or metrics in a call: MLflow takes 100 parameters and tags, 1,000 metrics
_TIMEOUT_S = 10  # of a call
_LONGEST = 5000  # characters of a parameter or tag
_PARENT = "mlflow.parentRunId"


@dataclass(frozen=True, slots=True)
class Sheet:
    """A run as it is opened."""

    name: str
    experiment: str
    folder: Path
    id: str | None  # that it has there; none: it is new
    parent: str | None  # id of the run that it belongs to
    params: Mapping[str, str]
    facts: Mapping[str, str]


class Ledger(Protocol):
    def begin(self, sheet: Sheet) -> str:
        """Opens a run, or goes on with it; its id."""
        ...

    def write(self, id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lines of a run's ``metrics.jsonl``."""
        ...

    def figures(self, id: str, found: Mapping[str, float]) -> None:
        """What stands at the end."""
        ...

    def facts(self, id: str, found: Mapping[str, str]) -> None: ...

    def file(self, id: str, file: Path, folder: str) -> str:
        """Keeps a file; why it does not, or nothing."""
        ...

    def end(self, id: str, status: str) -> None: ...

    def close(self) -> None: ...


def make(server: str, uri: str, folder: Path) -> Ledger:
    """
    Args:
        server: a key of `mmagent.config.TrackConfig`, and what it says.
        folder: for what is kept here.
    """
    return MlflowLedger(uri) if server == "mlflow" else WandbLedger(uri, folder)


def numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What a line of figures measures, named as in TensorBoard."""
    for key, value in row.items():
        if isinstance(value, (int, float)) and key not in ("step", "time_s"):
            yield f"{row['kind']}/{key}", float(value)


class MlflowLedger:
    """Args:
    uri: of a server, a database or a folder.
    """

    def __init__(self, uri: str) -> None:
        # Trying again is the caller's business, which does so without an end.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(_TIMEOUT_S)
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        from mlflow.tracking import MlflowClient

        self._made: dict[Path, str] = {}  # by this process: a call that failed is no reason to make a second
        self._artifacts: str | None = None
        if "://" not in uri:
            folder = storage.resolve(uri)
            folder.mkdir(parents=True, exist_ok=True)
            uri, self._artifacts = f"sqlite:///{folder}/mlflow.db", (folder / "artifacts").as_uri()
        self._client = MlflowClient(uri)

    def begin(self, sheet: Sheet) -> str:
        id = self._made.get(sheet.folder, sheet.id)
        if id is None or not self._known(id):
            tags = {"mlflow.runName": sheet.name, **({_PARENT: sheet.parent} if sheet.parent else {})}
            id = str(self._client.create_run(self._experiment(sheet.experiment), tags=tags).info.run_id)
            self._made[sheet.folder] = id
        else:
            self._client.update_run(id, status="RUNNING")
        has = self._client.get_run(id).data.params
        params = {_key(key): value[:_LONGEST] for key, value in sheet.params.items()}
        from mlflow.entities import Param

        for part in _parts([(key, value) for key, value in params.items() if key not in has]):
            self._client.log_batch(id, params=[Param(key, value) for key, value in part])
        # A parameter is for ever; what a run goes on with stands beside what it began with.
        changed = {f"now.{key}": value for key, value in params.items() if has.get(key, value) != value}
        self.facts(id, {**sheet.facts, **changed})
        return id

    def write(self, id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        made = [
            Metric(_key(key), value, int(row["time_s"] * 1000), int(row["step"]))
            for row in rows
            for key, value in numbers(row)
        ]
        for part in _parts(made):
            self._client.log_batch(id, metrics=part)

    def figures(self, id: str, found: Mapping[str, float]) -> None:
        self.write(id, [{"kind": "", "step": 0, "time_s": time.time(), key: value} for key, value in found.items()])

    def facts(self, id: str, found: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for part in _parts([RunTag(_key(key), value[:_LONGEST]) for key, value in found.items()]):
            self._client.log_batch(id, tags=part)

    def file(self, id: str, file: Path, folder: str) -> str:
        try:
            self._client.log_artifact(id, str(file), None if folder == "." else folder)
        except Exception as error:  # noqa: BLE001  each kind of store raises its own; the figures are there
            return f"{type(error).__name__}: {str(error)[:200]}"
        return ""

    def end(self, id: str, status: str) -> None:
        self._client.set_terminated(id, status)

    def close(self) -> None:
        """Nothing is held open."""

    def _known(self, id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if (found := self._client.get_experiment_by_name(name)) is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name, artifact_location=self._artifacts))
        except MlflowException as error:
            found = self._client.get_experiment_by_name(name)  # another run made it at this moment
            if found is None:
                raise error
            return str(found.experiment_id)


class WandbLedger:
    """Args:
    project: at Weights & Biases, or of the folder that `wandb sync` sends.
    folder: for its files.
    """

    def __init__(self, project: str, folder: Path) -> None:
        import wandb

        self._wandb, self._project, self._folder = wandb, project, folder
        self._runs: dict[str, Any] = {}

    def begin(self, sheet: Sheet) -> str:
        settings = self._wandb.Settings(
            console="off", silent=True, init_timeout=float(_TIMEOUT_S), x_disable_meta=False, x_disable_stats=True
        )
        # Trials are told from their search by the job's type; the search's name is their group.
        group = sheet.name.partition("/")[0] if sheet.parent else sheet.experiment
        made: Any = self._wandb.init(
            project=self._project, name=sheet.name, id=sheet.id or secrets.token_hex(4), resume="allow",
            dir=str(self._folder), group=group, job_type="trial" if sheet.parent else "run", config=dict(sheet.params),
            reinit="create_new", settings=settings, allow_val_change=True,
        )  # fmt: skip
        made.config.update({"system": dict(sheet.facts), "parent": sheet.parent}, allow_val_change=True)
        made.define_metric("*", step_metric="step")
        self._runs[str(made.id)] = made
        return str(made.id)

    def write(self, id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            finite = {key: value for key, value in numbers(row) if math.isfinite(value)}
            self._runs[id].log({"step": row["step"], **finite})

    def figures(self, id: str, found: Mapping[str, float]) -> None:
        self._runs[id].summary.update(dict(found))

    def facts(self, id: str, found: Mapping[str, str]) -> None:
        if found:
            self._runs[id].config.update(dict(found), allow_val_change=True)

    def file(self, id: str, file: Path, folder: str) -> str:
        base = file.parent if folder == "." else file.parent.parent
        try:
            self._runs[id].save(str(file), base_path=str(base), policy="now")
        except (OSError, ValueError, self._wandb.Error) as error:
            return str(error)
        return ""

    def end(self, id: str, status: str) -> None:
        self._runs.pop(id).finish(exit_code=int(status != "FINISHED"))

    def close(self) -> None:
        self._wandb.teardown()


def _key(name: str) -> str:
    """As MLflow takes it."""
    return re.sub(r"[^\w\-. :/]", "_", name).strip("/")[:250]


def _parts(items: Sequence[Any]) -> Iterable[list[Any]]:
    return (list(items[at : at + _BATCH]) for at in range(0, len(items), _BATCH))
