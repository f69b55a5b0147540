"""Chooses the questions that teach most when somebody labels them, and takes the labels back as feedback.

    python -m jobs.select --channel production --n 200 --out queue.jsonl          # or .csv; --format label-studio
    python -m jobs.select --channel production --labels labelled.jsonl            # of the same form, answers filled in

Asked are the questions that the service kept (--keep of serve.start) and nobody has corrected yet, over the service's
admin address (an API key of the scope admin in MMAGENT_API_KEY). How they are chosen says `mmagent.choosing`.

A row of the queue: answer (the id of the answer), task, text, answered (what was said), confidence, files of its
pictures and sounds below OUT.media/, and an empty label (labels of multilabel, separated by |; value of regress;
text_answer of generate and extract; spans of tag as JSON [{"start", "end", "label"}]). Rows that come back without an
answer are left out. Label Studio's JSON is read back as it exports it (choices, number, text, labels).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import promote, queue
from jobs.progress import Progress
from jobs.promote import PromoteError
from jobs.queue import Question, QueueError
from mmagent import channels, choosing, feedback, storage
from mmagent.arguments import Parser, positive
from mmagent.bundle import BundleError
from mmagent.channels import ChannelError
from mmagent.choosing import Weighed
from mmagent.predictor import Predictor
from mmagent.record import Record

_ASKED = 5000  # kept questions that are looked at, the newest
_PAGE = 200
_PASS = 32


class SelectError(RuntimeError):
    """It could not be done; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.labels is not None:
            taken, again, left = queue.take(args.labels, args.key)
            more = f", {again} were known" if again else ""
            print(f"{taken} labels taken as feedback of {args.key!r}, {left} rows without one{more}")
        else:
            print(_selected(args))
    except (SelectError, QueueError, PromoteError, BundleError, ChannelError, storage.StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename}", file=sys.stderr)
        return 2
    return 0


# -- choosing ----------------------------------------------------------------------------------------------------------


def _selected(args: argparse.Namespace) -> str:
    if args.out is None:
        raise SelectError("--out FILE is wanted for the queue, or --labels FILE to take one back")
    asked = _open_questions(args)
    if not asked:
        return f"no question of {args.channel} waits for a label: none is kept, or all are corrected"
    state = channels.read(args.channel)
    now, before = Predictor.load(state.bundle), _loaded(state.before())
    found: list[tuple[Question, Weighed]] = []
    with Progress("select", len(asked), "questions") as progress:
        for at in range(0, len(asked), _PASS):
            part = asked[at : at + _PASS]
            weighed = choosing.weigh([each.record for each in part], now, before)
            found += [(each, made) for each, made in zip(part, weighed, strict=True) if made is not None]
            progress.add(len(part))
    chosen = [found[index] for index in choosing.best([made for _, made in found], args.n, args.seed)]
    place: Path = args.out
    queue.write([(each, made.answer) for each, made in chosen], [made.score for _, made in chosen], place, args.format)
    return f"{len(chosen)} of {len(asked)} questions to label: {place}"


def _loaded(path: str | None) -> Predictor | None:
    try:
        return Predictor.load(path) if path else None
    except BundleError as error:
        print(f"note: the bundle before cannot be asked: {error}", file=sys.stderr)
        return None


def _open_questions(args: argparse.Namespace) -> list[Question]:
    """Kept questions that nobody has corrected."""
    url = args.url or promote.service_of(args.channel)
    if url is None:
        raise SelectError(f"no service follows the channel {args.channel!r}: start one, or name its address with --url")
    corrected = {str(each.content.get("answer")) for each in feedback.read(feedback.folder()).said}
    out: list[Question] = []
    cursor = ""
    while len(out) < _ASKED:
        page = promote.call(url, "GET", f"/admin/questions?limit={_PAGE}&before={cursor}")
        out += [_question(row) for row in page["data"] if row["answer"] not in corrected]
        cursor = page["next"] or ""
        if not cursor:
            break
    return out


def _question(row: Mapping[str, Any]) -> Question:
    return Question(row["answer"], row["trace"], Record.from_row(feedback.restored(row["record"])))


def _parser() -> Parser:
    parser = Parser("jobs.select", __doc__)
    parser.add_argument("--channel", default="production", help="whose questions (default %(default)s)")
    parser.add_argument("--n", type=positive, default=200, help="how many (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the queue: .jsonl, .csv, or .json of --format")
    parser.add_argument("--format", choices=queue.FORMATS, help="of --out; by its name, if not given")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="a queue with answers, to be taken as feedback")
    parser.add_argument("--key", default="labeller", help="as whose feedback labels count (default %(default)s)")
    parser.add_argument("--url", help="of the service; that of the channel, where not given")
    parser.add_argument("--seed", type=int, default=0, help="of the clusters")
    return parser


if __name__ == "__main__":
    sys.exit(main())
