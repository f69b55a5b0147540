"""The demo's own parts: what it started and stops, how it submits, what it asks, and what it makes of the answers."""

from __future__ import annotations

import functools
import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, cast

import pytest

from jobs import client, demo, findings, interview, submission
from jobs.cluster import Cluster
from jobs.interview import InterviewError
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.shards import Dataset

CHECKOUT = Path(__file__).parents[1]


@pytest.mark.parametrize("arguments", [["run", "--bundle", "x"], ["serve"], ["run", "--nmae", "x"], ["rnu"]])
def test_wrong_arguments_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


# ---- jobs


def test_a_job_runs_with_our_storage_in_a_copy_of_kilobytes(
    ray_cluster: Cluster, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import os, pathlib; print('root', os.environ['MMAGENT_STORAGE']);"
        "print('bytes', sum(p.stat().st_size for p in pathlib.Path().rglob('*') if p.is_file()));"
        "print('rooms', sorted(p.name for p in pathlib.Path().iterdir() if p.is_dir()))"
    )
    submission.run(ray_cluster.dashboard, ["python", "-c", code], CHECKOUT)
    out = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines() if line.startswith(("ro", "by")))
    assert out["root"] == str(storage)
    assert int(out["bytes"]) < 3_000_000
    assert out["rooms"] == "['jobs', 'mmagent', 'serve']"


def test_a_job_that_fails_passes_its_exit_code_on(ray_cluster: Cluster, storage: Path) -> None:
    with pytest.raises(submission.JobFailed, match="exit code 7") as failed:
        submission.run(
            ray_cluster.dashboard, ["python", "-c", "import sys; sys.exit(7)"], CHECKOUT / "jobs" / "recipes"
        )
    assert failed.value.exit_code == 7


def test_ctrl_c_stops_the_job_before_it_leaves(ray_cluster: Cluster, storage: Path, tmp_path: Path) -> None:
    # The job writes down that it was asked to end: a training would save its last checkpoint there.
    job = (
        "import pathlib, signal, sys, time\n"
        f"def end(*_): pathlib.Path({str(tmp_path / 'ended')!r}).touch(); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, end); print('job runs', flush=True); time.sleep(300)"
    )
    script = (
        "from pathlib import Path; from jobs import submission;"
        f"submission.run({ray_cluster.dashboard!r}, ['python', '-c', {job!r}], Path('jobs/recipes').resolve())"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", script], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True,
        # What a shell runs in the background ignores Ctrl-C, and so do its children: a suite may be run so.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert command.stdout
    for line in command.stdout:
        if line.startswith("job runs"):
            break
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=90)
    assert command.returncode != 0
    assert (tmp_path / "ended").exists()


class _Late:
    """A Ray whose agent comes late."""

    def __init__(self, refusals: int, why: str) -> None:
        self.refusals, self.why = refusals, why

    def submit_job(self, **_: Any) -> str:
        self.refusals -= 1
        if self.refusals >= 0:
            raise RuntimeError(f"Request failed with status code 500: {self.why}.")
        return "job-1"


def test_a_ray_that_has_just_begun_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "RETRY_S", 0.01)
    why = "No available agent to submit job, please try again later"
    late: Any = _Late(3, why)
    assert submission._submit(late, "http://ray", "true", {}) == "job-1"
    with pytest.raises(RuntimeError, match="bad runtime environment"):
        submission._submit(cast(Any, _Late(1, "bad runtime environment")), "http://ray", "true", {})
    monkeypatch.setattr(submission, "AGENT_TIMEOUT_S", 0.05)
    with pytest.raises(submission.NoCluster, match="no agent of it was there"):
        submission._submit(cast(Any, _Late(10_000, why)), "http://ray", "true", {})


@pytest.mark.long
def test_a_command_that_already_runs_is_followed_not_started_twice(
    ray_cluster: Cluster, storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = f"import pathlib, time; open({str(tmp_path / 'starts')!r}, 'a').write('x'); time.sleep(8); print('done')"
    arguments = (ray_cluster.dashboard, ["python", "-c", code], CHECKOUT / "jobs" / "recipes")
    first = threading.Thread(target=submission.run, args=arguments)
    first.start()
    end = time.monotonic() + 60
    while not (tmp_path / "starts").exists():
        assert time.monotonic() < end
        time.sleep(0.2)
    submission.run(*arguments)
    first.join()
    assert (tmp_path / "starts").read_text() == "x"
    assert "already running" in capsys.readouterr().out


def test_no_ray_at_the_address_is_named(storage: Path) -> None:
    with pytest.raises(submission.NoCluster, match="RAY_ADDRESS"):
        submission.run("http://127.0.0.1:9", ["python", "-V"], CHECKOUT)


# ---- questions and answers


class Service(BaseHTTPRequestHandler):
    """A real HTTP server with fixed answers: label and confidence by the kinds of parts that came."""

    answers: dict[str, tuple[str, float]]
    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        kinds = "+".join(part["type"] for part in body["messages"][0]["content"])
        if kinds not in self.answers:
            self._reply(422, {"error": {"message": f"no answer to {kinds}", "type": "invalid_request_error"}})
            return
        label, confidence = self.answers[kinds]
        self._reply(200, {"id": "ans_1", "mmagent": {"label": label, "confidence": confidence, "bundle": "demo"}})

    def _reply(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def service() -> Iterator[str]:
    Service.asked = []
    Service.answers = {
        "image_url+text": ("red", 0.99),
        "image_url+input_audio": ("circle", 0.9),
        "text": ("blue", 0.2),
    }
    server = HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def row(id: str, form: str, family: str, label: str, **parts: Any) -> Record:
    meta = {"form": form, "family": family, "question": f"what {family}?", "voice": "en-029+m5"}
    return parse({"id": id, "split": "test", "label": label, "meta": meta, **parts})


@pytest.fixture
def dataset(tmp_path: Path, make_png: Callable[..., bytes], make_wav: Callable[..., bytes]) -> Dataset:
    from mmagent.shards import INFO_FILE, SPLITS, ShardWriter

    image, sound = make_png("red"), make_wav(format="FLAC")
    rows = [
        row("no-image", "text", "color", "none", text="what color?"),
        row("asked", "text", "color", "red", text="what color?", image=image),
        row("known", "speech_known", "shape", "none", audio=sound, image=image),
        row("heard", "speech_unseen", "shape", "circle", audio=sound, image=image),
        row("second", "speech_unseen", "shape", "none", audio=sound, image=image),
    ]
    with ShardWriter(tmp_path, "test") as writer:
        for record in rows:
            writer.add(record)
        shards = writer.close()
    splits = {split: {"rows": 0, "shards": []} for split in SPLITS} | {"test": {"rows": len(rows), "shards": shards}}
    tasks: dict[str, Any] = {"classify": {"labels": []}}
    info = {"format_version": 1, "schema_version": 1, "name": "x", "task": "classify", "tasks": tasks, "splits": splits}
    (tmp_path / INFO_FILE).write_text(json.dumps(info))
    return Dataset.open(tmp_path)


def test_two_right_answers_and_a_doubt_pass(service: str, dataset: Dataset) -> None:
    asked = interview.questions(dataset)
    assert [question.record.id for question in asked] == ["asked", "heard", "blind"]
    answered = interview.ask(service, asked, "demo")
    assert [item.passed for item in answered] == [True, True, True]
    shown = interview.table(answered)
    assert "en-029+m5" in shown
    assert "honest doubt" in shown
    assert "WRONG" not in shown


@pytest.mark.parametrize(
    ("parts", "answer", "shown"),
    [
        ("image_url+text", ("green", 0.99), "WRONG"),
        ("image_url+input_audio", ("none", 0.9), "WRONG"),
        ("text", ("red", 0.31), "TOO SURE"),
    ],
)
def test_a_wrong_answer_or_a_bold_guess_fails(
    parts: str, answer: tuple[str, float], shown: str, service: str, dataset: Dataset
) -> None:
    Service.answers[parts] = answer
    answered = interview.ask(service, interview.questions(dataset), "demo")
    assert sum(item.passed for item in answered) == 2
    assert shown in interview.table(answered)


def test_answers_of_another_bundle_are_refused(service: str, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "winner"}')
    assert interview.name_of(tmp_path) == "winner"
    with pytest.raises(InterviewError, match="answers by demo, but winner was served"):
        interview.ask(service, interview.questions(dataset), "winner")


def test_the_services_own_words_come_through(service: str, dataset: Dataset) -> None:
    del Service.answers["text"]
    with pytest.raises(client.ServiceError, match="422: no answer to text"):
        interview.ask(service, interview.questions(dataset), "demo")
    with pytest.raises(client.ServiceError, match="does not answer"):
        client.ask("http://127.0.0.1:9", {})


def test_a_data_set_without_such_questions_is_named(dataset: Dataset) -> None:
    with pytest.raises(InterviewError, match="speech_unseen"):
        interview._first(dataset, form="speech_unseen", family="color")


def test_the_printed_curl_asks_the_same(service: str, dataset: Dataset) -> None:
    body = client.question(interview.questions(dataset)[1].record, "demo")
    printed = shlex.split(client.curl(service, body))
    assert json.loads(printed[-1]) == body
    run = subprocess.run(printed, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["mmagent"]["label"] == "circle"
    assert Service.asked == [body]


# ---- figures


def evaluation() -> dict[str, Any]:
    def part(value: float) -> dict[str, Any]:
        return {"n": 10, "metrics": {"accuracy": {"value": value, "low": value, "high": value}}}

    forms = {"text": 0.995, "speech_known": 0.98, "speech_unseen": 0.89, "paraphrase": 0.85}
    return {
        "slices": {f"form={form}": part(value) for form, value in forms.items()},
        "before": {"majority": part(0.67), "linear_probe": part(0.72)},
        "blind": {"gap": 0.03},
    }


TIMING = {"start_s": 30.0, "train_s": 500.0, "export_s": 5.0, "evaluate_s": 60.0, "wait_share": 0.01}


def test_figures_carry_their_goals(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    (tmp_path / "timing.json").write_text(json.dumps(TIMING))
    fresh = findings.Times(total_s=700.0, prepare_s=90.0, train_s=650.0, serve_s=20.0)
    rows = {row.id: row for row in findings.findings(tmp_path, fresh)}
    assert list(rows) == [
        "demo.accuracy.text", "demo.accuracy.speech_known", "demo.accuracy.speech_unseen", "demo.accuracy.paraphrase",
        "demo.accuracy.majority", "demo.accuracy.linear_probe", "demo.blind_gap", "demo.wait_share", "demo.seconds",
    ]  # fmt: skip
    assert rows["demo.accuracy.text"].value == pytest.approx(99.5)
    assert [row.id for row in rows.values() if row.met is False] == ["demo.accuracy.speech_unseen"]
    assert rows["demo.seconds"].value == 700.0
    assert "questions, the rest" in fresh.breakdown(tmp_path)
    again = findings.Times(total_s=None, prepare_s=1.0, train_s=3.0, serve_s=20.0)
    assert findings.findings(tmp_path, again)[-1].value == pytest.approx(615.0)


def test_a_run_without_a_figure_is_named(tmp_path: Path) -> None:
    times = findings.Times(total_s=1.0, prepare_s=1.0, train_s=1.0, serve_s=1.0)
    with pytest.raises(findings.FindingsError, match=r"evaluation\.json"):
        findings.findings(tmp_path, times)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation() | {"before": {}}))
    (tmp_path / "timing.json").write_text(json.dumps(TIMING))
    with pytest.raises(findings.FindingsError, match="majority"):
        findings.findings(tmp_path, times)
