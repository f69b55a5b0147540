"""Makes knowledge of documents: passages with vectors in LanceDB, which an agent answers from where it is unsure.

    python -m jobs.index --docs handbook/ --name handbook --bundle shop
    python -m jobs.index --docs handbook/ --name handbook --backbone sentence-transformers/all-MiniLM-L6-v2
    python -m jobs.index --name handbook --ask "how long is the warranty?"

Reads Markdown, text, HTML, PDF, pictures with captions (NAME.png and NAME.txt) and past conversations (NAME.jsonl: a
question and its answer a line). Vectors are made on Ray Data by the bundle's language model, or the one that --backbone
names. The same command again takes up what changed: passages that stayed keep their vectors. A file that cannot be read
is told and left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import cluster
from jobs.cluster import ClusterError
from jobs.lock import LockError, locked
from jobs.progress import Progress
from mmagent import bundle as bundles
from mmagent import documents, knowledge, storage
from mmagent.arguments import Parser, positive
from mmagent.bundle import BundleError
from mmagent.documents import DocumentError, Passage
from mmagent.embedder import Embedder
from mmagent.knowledge import KnowledgeBase, KnowledgeError
from mmagent.text import BackboneError

_BATCH_ROWS = 64


class IndexingError(ValueError):
    """Documents that cannot be indexed; the message says why."""


_EXPECTED = (IndexingError, KnowledgeError, BundleError, BackboneError, LockError, ClusterError, storage.StorageError)


class Embedding:
    """Called with a table of ``words``, gives them back with ``vector``; what runs in the actors."""

    def __init__(self, backbone: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._embed = Embedder(backbone)

    def __call__(self, table: pa.Table) -> pa.Table:
        vectors = self._embed(table["words"].to_pylist())
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), vectors.shape[1])
        return table.append_column("vector", column)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.ask is not None:
            return _ask(args.name, args.ask)
        if args.docs is None:
            raise IndexingError("--docs FOLDER is wanted, or --ask QUESTION")
        folder = storage.folder("kb", args.name)
        with locked(folder):
            _index(args, folder)
    except _EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or storage.root()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the knowledge is as it was; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _index(args: argparse.Namespace, folder: Path) -> None:
    backbone = _backbone(args)
    passages = _passages(args.docs.expanduser().resolve())
    before = knowledge.known(folder, backbone)
    fresh = [each for each in passages if each.id not in before]
    vectors: dict[str, Any] = {each.id: before[each.id] for each in passages if each.id in before}
    if fresh:
        cluster.connect()
        from jobs import stream  # brings Ray, which reads its environment when it is imported

        table = pa.table({"id": [each.id for each in fresh], "words": documents.searched(fresh)})
        kwargs = {"backbone": backbone, "threads": args.threads}
        with Progress("index", len(fresh), "passages") as progress:
            progress.begin()
            for part in stream.over(
                table, Embedding, kwargs, workers=args.workers, batch_rows=_BATCH_ROWS, threads=args.threads
            ):
                vectors |= zip(part["id"].to_pylist(), part["vector"].to_pylist(), strict=True)
                progress.add(len(part))
    rows = pa.table(
        {
            "id": [each.id for each in passages],
            **{
                key: [getattr(each, key) for each in passages] for key in ("text", "source", "title", "answer", "image")
            },
            "vector": _column([vectors[each.id] for each in passages]),
        }
    )
    info = {"name": folder.name, "docs": str(args.docs), "backbone": backbone, "created_ms": int(time.time() * 1000)}
    knowledge.write(folder, rows, info)
    sources = len({each.source.partition("#")[0] for each in passages})
    print(f"knowledge {folder.name}: {len(passages):,} passages of {sources:,} files ({len(fresh):,} new): {folder}")


def _column(vectors: Sequence[Sequence[float]]) -> pa.Array:
    flat = np.asarray(vectors, np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])


def _backbone(args: argparse.Namespace) -> str:
    if args.backbone:
        return str(args.backbone)
    if not args.bundle:
        raise IndexingError("--bundle B (its language model makes the vectors) or --backbone FOLDER is wanted")
    return str(bundles.load(args.bundle).path / "backbone")


def _passages(docs: Path) -> list[Passage]:
    if not docs.is_dir():
        raise IndexingError(f"{docs} is no folder")
    found, bad = [], []
    for file in documents.files(docs):
        try:
            found += documents.read(file, docs)
        except DocumentError as error:
            bad.append(str(error))
    for words in bad:
        print(f"left out: {words}", file=sys.stderr)
    if not found:
        raise IndexingError(f"{docs} holds nothing to index: {', '.join(documents.KINDS)} are read")
    return list({each.id: each for each in found}.values())


def _ask(name: str, question: str) -> int:
    for each in KnowledgeBase.open(name).search(question, 3):
        print(f"{each.score:.3f}  {each.source}  {each.title}\n       {each.answer or each.text}")
    return 0


def _parser() -> Parser:
    parser = Parser("jobs.index", __doc__)
    parser.add_argument("--docs", type=Path, help="a folder of documents")
    parser.add_argument("--name", required=True, help="the knowledge's name")
    parser.add_argument("--bundle", help="whose language model makes the vectors: a bundle folder, or a run's name")
    parser.add_argument("--backbone", help="another language model: a folder or a hub id")
    parser.add_argument("--ask", metavar="QUESTION", help="shows what is found for a question, and indexes nothing")
    parser.add_argument("--workers", type=positive, default=2, help="processes that make vectors (%(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of each (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
