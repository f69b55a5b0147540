"""Moves a channel to a bundle, through the gate of the service that follows it; and back.

    python -m jobs.promote --bundle shop2 --channel production                  # all traffic, at once
    python -m jobs.promote --bundle shop2 --channel production --canary 0.1     # a tenth of conversations
    python -m jobs.promote --channel production --rollback
    python -m jobs.promote --channel production --show

The service (--url, or the one that `serve.start` recorded for the channel) loads the bundle beside the present one,
asks its golden examples through the whole serving path, compares the answers with those that were stored when it was
exported (same labels, probabilities within 1e-4), and moves traffic where they hold. A bundle that was built for
something else, which lacks a task, a label or a kind of input of the present one, is refused before anything is asked,
unless --other-task says that it is meant. The service's API key, of the scope admin, comes from MMAGENT_API_KEY. Where
no service follows the channel, the golden examples are asked here, and the channel is written.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from mmagent import bundle as bundles
from mmagent import channels, storage, succession
from mmagent.arguments import Parser
from mmagent.bundle import Bundle, BundleError
from mmagent.channels import ChannelError
from mmagent.golden import difference
from mmagent.predictor import Predictor
from mmagent.rows import parse
from mmagent.succession import MisfitError

KEY_VARIABLE = "MMAGENT_API_KEY"
EXIT_REFUSED = 3  # the gate said no
_TIMEOUT_S = 300.0


class PromoteError(RuntimeError):
    """It could not be done; the message says why."""


class RefusedError(PromoteError):
    """The gate refuses the bundle."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.show:
            _show(args.channel)
        elif args.rollback:
            _rollback(args)
        else:
            _promote(args)
    except RefusedError as error:
        print(f"refused: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except (PromoteError, BundleError, ChannelError, storage.StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _promote(args: argparse.Namespace) -> None:
    if args.bundle is None:
        raise PromoteError("--bundle B is wanted, or --rollback, or --show")
    found = bundles.load(args.bundle)
    url = args.url or service_of(args.channel)
    share = 1.0 if args.canary is None else args.canary
    if not 0 < share <= 1:
        raise PromoteError(f"--canary is {share:g}, but a share above 0 and up to 1 is wanted")
    if url is None:
        if not args.other_task:
            _check_place(args.channel, found)
        if share < 1:
            raise PromoteError(f"no service follows the channel {args.channel!r}, so there is no traffic to share out")
        worst = _ask_golden(found)
        channels.append(
            args.channel, found.path, share=1.0, act="promote", by="jobs.promote", golden=len(found.golden())
        )
        print(
            f"channel {args.channel}: {found.name} ({found.path}); {_golden(len(found.golden()), worst)}. No service "
            f"follows it: python -m serve.start --channel {args.channel}"
        )
        return
    body = {"bundle": str(found.path), "channel": args.channel, "share": share, "other_task": args.other_task}
    told = call(url, "POST", "/admin/bundles", body)
    what = f"a canary of {share:.0%} is {told['canary']}" if told.get("canary") else f"{told['bundle']} answers"
    replicas = told["replicas"]
    golden = _golden(told["golden_asked"], told["worst_probability_difference"])
    print(f"channel {args.channel}: {what}; {golden}; {replicas['follow']} of {replicas['alive']} replicas follow")


def _golden(asked: int, worst: float) -> str:
    return f"{asked} golden examples within {worst:.1g}" if asked else "it holds no golden examples to ask"


def _check_place(channel: str, found: Bundle) -> None:
    """
    Raises:
        RefusedError: the channel has a bundle, and this one was built for something else.
    """
    if not channels.file(channel).is_file():
        return
    try:
        present = bundles.load(channels.read(channel).bundle)
    except BundleError as error:
        print(f"note: the bundle that answers cannot be compared: {error}", file=sys.stderr)
        return
    try:
        succession.check(succession.of_bundle(present), succession.of_bundle(found))
    except MisfitError as error:
        raise RefusedError(f"{error}; --other-task moves the channel all the same") from error


def _rollback(args: argparse.Namespace) -> None:
    url = args.url or service_of(args.channel)
    if url is not None:
        told = call(url, "POST", "/admin/rollback", {"channel": args.channel})
        print(f"channel {args.channel}: {told['bundle']} answers again, {told['replicas']['follow']} replicas follow")
        return
    state = channels.read(args.channel)
    target = state.back()
    if target is None:
        raise PromoteError(f"the channel {args.channel!r} has no bundle before {state.bundle}")
    channels.append(args.channel, target, share=1.0, act="rollback", by="jobs.promote")
    print(f"channel {args.channel}: back to {target}; no service follows it")


def _show(channel: str) -> None:
    import time

    state = channels.read(channel)
    for line in state.lines:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(line.get("at_ms", 0) / 1000))
        share = "" if float(line.get("share", 1.0)) >= 1 else f"  {float(line['share']):.0%}"
        print(f"{at}  {line.get('act', 'promote'):<9} {line['bundle']}{share}")


def service_of(channel: str) -> str | None:
    """The address of the service that follows a channel, as `serve.start` recorded it, where it answers."""
    file = storage.root() / "serve" / "services.json"
    try:
        url = json.loads(file.read_text())[channel]["url"]
        with urllib.request.urlopen(f"{url}/healthz", timeout=5, context=_trust(url)) as answer:
            follows = json.load(answer).get("channel")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(url) if follows == channel else None


def _ask_golden(found: Bundle) -> float:
    """The largest difference between a bundle's golden answers and those that it gives here.

    Raises:
        RefusedError: an answer is another one.
    """
    golden = found.golden()
    answers = Predictor.load(found.path, device="cpu").predict([parse(row["record"]) for row in golden])
    worst = 0.0
    for number, (row, answer) in enumerate(zip(golden, answers, strict=True)):
        words, off = difference(row["answer"], answer.to_dict())
        worst = max(worst, off)
        if words:
            raise RefusedError(f"{found.name}: golden example {number} gets another answer here: {words}")
    return worst


def call(url: str, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """What a service's admin address answers, as JSON.

    Raises:
        RefusedError: the gate refuses a bundle.
        PromoteError: it answers otherwise, or not at all.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/") + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=_trust(url)) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        try:
            told = json.loads(error.read())["error"]
        except (ValueError, KeyError, TypeError):
            told = {"message": f"{url} answers {error.code}", "code": ""}
        if told["code"] in ("parity_failed", "other_task"):
            raise RefusedError(told["message"]) from error
        more = f" (set {KEY_VARIABLE} to a key of the scope admin)" if error.code in (401, 403) else ""
        raise PromoteError(f"{told['message']}{more}") from error
    except OSError as error:
        raise PromoteError(f"the service at {url} does not answer: {error}") from error


def _trust(url: str) -> ssl.SSLContext:
    """On this machine itself a certificate that names another host is taken."""
    return ssl._create_unverified_context() if "://127.0.0.1" in url else ssl.create_default_context()


def _parser() -> Parser:
    parser = Parser("jobs.promote", __doc__)
    parser.add_argument("--channel", default="production", help="the channel to move (%(default)s)")
    parser.add_argument("--bundle", help="a bundle folder, or the name of a run or search")
    parser.add_argument("--canary", type=float, metavar="SHARE", help="of conversations, in place of all")
    parser.add_argument(
        "--other-task", action="store_true", help="also where it lacks a task or label of the present bundle"
    )
    parser.add_argument("--rollback", action="store_true", help="end the canary, or go back to the bundle before")
    parser.add_argument("--show", action="store_true", help="print the channel's history")
    parser.add_argument("--url", help="of the service; that of the channel, where not given")
    return parser


if __name__ == "__main__":
    sys.exit(main())
