"""Documents become passages that a search can find and an answer can quote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmagent import documents
from mmagent.documents import DocumentError


def written(folder: Path, name: str, text: str | bytes) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def pdf(*pages: str) -> bytes:
    """A PDF by hand: one line of text on each page."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
        kids.append(len(objects) + 1)
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /Contents %d 0 R /Resources << /Font << /F1 << /Type /Font /Subtype /Type1 "
            b"/BaseFont /Helvetica >> >> >> /MediaBox [0 0 612 792] >>" % (len(objects) + 2)
        )
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    refs = b" ".join(b"%d 0 R" % kid for kid in kids)
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (refs, len(kids))
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(out)
    size = len(objects) + 1
    return out + b"xref\n0 %d\n0000000000 65535 f \n%strailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        size, table, size, start,
    )  # fmt: skip


def test_sections_of_markdown(tmp_path: Path) -> None:
    file = written(
        tmp_path, "a/terms.md", "intro\n\n# Refunds\n\nA week.\n\n```\n# no heading\n```\n## Late\nCall us.\n# Else\n"
    )
    found = documents.read(file, tmp_path)
    assert [(each.title, each.text) for each in found] == [
        ("terms", "intro"), ("Refunds", "A week. ``` # no heading ```"), ("Refunds > Late", "Call us."),
    ]  # fmt: skip
    assert {each.source for each in found} == {"a/terms.md"}
    assert documents.searched(found)[1].startswith("Refunds. A week.")


def test_long_sections_are_cut_with_overlap(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(500)]
    found = documents.read(written(tmp_path, "long.txt", " ".join(words)), tmp_path)
    assert all(len(each.text.split()) <= 160 for each in found)
    assert [word for each in found for word in each.text.split() if each is found[0]] == words[:160]
    assert found[1].text.split()[0] == "w130"
    assert set(" ".join(each.text for each in found).split()) == set(words)


def test_html_without_scripts(tmp_path: Path) -> None:
    page = "<title>Shop</title><nav>menu</nav><script>x</script><h1>Returns &amp; refunds</h1><p>One</p><p>week.</p>"
    found = documents.read(written(tmp_path, "p.html", page), tmp_path)
    assert [(each.title, each.text) for each in found] == [("Returns & refunds", "One week.")]


def test_pages_of_a_pdf(tmp_path: Path) -> None:
    found = documents.read(written(tmp_path, "m.pdf", pdf("Press the red button", "Then wait")), tmp_path)
    assert [(each.source, each.text) for each in found] == [
        ("m.pdf#page=1", "Press the red button"), ("m.pdf#page=2", "Then wait"),
    ]  # fmt: skip


def test_pictures_with_captions_and_conversations(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    written(tmp_path, "plug.png", make_png())
    written(tmp_path, "plug.txt", "The plug,\n seen from behind")
    said = [("user", "hi"), ("assistant", "hello"), ("user", "how long?"), ("assistant", "A week.")]
    talk = [
        {"question": "is it  safe?", "answer": "Yes."},
        {"messages": [{"role": role, "content": words} for role, words in said]},
    ]
    written(tmp_path, "past.jsonl", "\n".join(map(json.dumps, talk)))
    files = documents.files(tmp_path)
    assert [file.name for file in files] == ["past.jsonl", "plug.png"]
    past, plug = (documents.read(file, tmp_path) for file in files)
    assert [(each.text, each.answer) for each in past] == [("is it safe?", "Yes."), ("how long?", "A week.")]
    assert (plug[0].text, plug[0].image) == ("The plug, seen from behind", "plug.png")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [("x.md", b"\xff\xfe\x00", "as text"), ("x.png", b"", "without a caption"), ("x.pdf", b"%PDF-1.4 broken", "PDF"),
     ("x.jsonl", b'{"q": 1}', "line 1"), ("x.jsonl", b"{", "line 1")],
)  # fmt: skip
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    with pytest.raises(DocumentError, match=says):
        documents.read(written(tmp_path, name, data), tmp_path)
