"""Knowledge: passages in LanceDB, found by meaning and by words.

    kb/NAME/{kb.json, lance/}

Both searches are put together by reciprocal rank (G. Cormack et al. 2009, "Reciprocal rank fusion outperforms Condorcet
and individual rank learning methods", SIGIR); a passage's score is its likeness to the question, the cosine of the two.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmagent import storage
from mmagent.agent.turn import Passage
from mmagent.embedder import Embedder

INFO_FILE = "kb.json"
TABLE = "passages"
_FORMAT = 1
_WIDER = 4  # candidates of each search, for each passage that is wanted
_RANK = 60  # of reciprocal rank fusion: the paper's


class KnowledgeError(ValueError):
    """A knowledge base that is not there or cannot be read."""


class KnowledgeBase:
    """May be searched from several threads; its language model is loaded at the first question."""

    def __init__(self, folder: Path, info: dict[str, Any], table: Any) -> None:
        self.folder, self.info, self._table = folder, info, table
        self._embedder: Embedder | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, name: str) -> KnowledgeBase:
        """
        Raises:
            KnowledgeError: see the class.
        """
        import lancedb

        folder = storage.fetched(storage.folder("kb", name))
        try:
            info = json.loads((folder / INFO_FILE).read_text())
        except (OSError, ValueError) as error:
            raise KnowledgeError(
                f"there is no knowledge {name!r} ({folder}): python -m jobs.index --docs FOLDER --name {name} makes it"
            ) from error
        if info.get("format_version") != _FORMAT:
            raise KnowledgeError(f"the knowledge {name!r} is of another version of mmagent: index it again")
        return cls(folder, info, lancedb.connect(folder / info["lance"]).open_table(TABLE))

    def search(self, question: str, count: int) -> list[Passage]:
        """The passages that fit best, the best first."""
        with self._lock:
            if self._embedder is None:
                self._embedder = Embedder(self.info["backbone"])
            [vector] = self._embedder([question])
        wide = count * _WIDER
        alike = self._table.search(vector).distance_type("cosine").limit(wide).to_arrow()
        worded = self._worded(question, wide)
        rows: dict[str, dict[str, Any]] = {}
        ranks: dict[str, float] = {}
        for found in (alike.to_pylist(), worded):
            for rank, row in enumerate(found):
                rows.setdefault(row["id"], row)
                ranks[row["id"]] = ranks.get(row["id"], 0.0) + 1 / (_RANK + rank + 1)
        best = sorted(ranks, key=lambda id: -ranks[id])[:count]
        return [_passage(rows[id], float(np.dot(rows[id]["vector"], vector))) for id in best]

    def _worded(self, question: str, count: int) -> list[dict[str, Any]]:
        from lancedb.query import MatchQuery

        if not any(letter.isalnum() for letter in question):
            return []
        make: Any = MatchQuery  # declared with more than it wants
        query = make(question, "text")
        return list(self._table.search(query, query_type="fts").limit(count).to_arrow().to_pylist())


def write(folder: Path, rows: pa.Table, info: dict[str, Any]) -> None:
    """Publishes passages under a name: the table first, then what points to it; the older table goes last.

    Args:
        rows: id, text, source, title, answer, image, vector.
    """
    import lancedb
    from lancedb.index import FTS

    before = _before(folder)
    place = f"lance-{int(before.partition('-')[2] or 0) + 1 if before else 1}"
    database = lancedb.connect(folder / place)
    table = database.create_table(TABLE, rows, mode="overwrite")
    table.create_index("text", config=FTS())
    storage.publish_json(folder / INFO_FILE, {**info, "format_version": _FORMAT, "lance": place, "passages": len(rows)})
    if before and before != place:
        import shutil

        shutil.rmtree(folder / before, ignore_errors=True)


def known(folder: Path, backbone: str) -> dict[str, Sequence[float]]:
    """Vectors of an earlier index made with the same language model, by passage."""
    import lancedb

    try:
        info = json.loads((folder / INFO_FILE).read_text())
    except (OSError, ValueError):
        return {}
    if info.get("format_version") != _FORMAT or info.get("backbone") != backbone:
        return {}
    found = lancedb.connect(folder / info["lance"]).open_table(TABLE).to_arrow().select(["id", "vector"])
    return dict(zip(found["id"].to_pylist(), found["vector"].to_pylist(), strict=True))


def _before(folder: Path) -> str:
    try:
        return str(json.loads((folder / INFO_FILE).read_text())["lance"])
    except (OSError, ValueError, KeyError):
        return ""


def _passage(row: dict[str, Any], score: float) -> Passage:
    return Passage(row["text"], row["source"], score, row["title"], row["answer"] or None)
