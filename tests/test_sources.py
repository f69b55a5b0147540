"""Sources: how files of users are read, and what easy-VQA becomes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.sources import BadRow, GoodRow, SourceError
from jobs.sources.choose import choose
from jobs.sources.delimited import Delimited
from jobs.sources.easy_vqa import RECIPE_FILE, EasyVqa, Recipe, Voices, family_of, reword
from jobs.sources.folder import Folder
from jobs.sources.jsonl import JsonLines
from jobs.sources.parquet import Parquet
from jobs.sources.readers import Reader
from jobs.sources.table import Table


def _values(reader: Reader) -> list[dict[str, Any]]:
    return [dict(row.values) for row in reader.rows() if row.values is not None]


def _rows(table: Table) -> list[GoodRow | BadRow]:
    return list(table.rows(workers=1))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "^", "\x1f"])
def test_csv_of_any_delimiter(tmp_path: Path, delimiter: str) -> None:
    file = tmp_path / "rows.csv"
    rows = [["text", "label"], [f'said "{delimiter}" twice\nand on, and; on', "a"], ["plain", "b"]]
    quoted = "\r\n".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    file.write_bytes(b"\xef\xbb\xbf" + quoted.encode())
    assert _values(Delimited(file)) == [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def test_csv_of_one_column_and_of_excel(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text\nhello, you\n\nyou\n")
    assert [row.reason for row in Delimited(file).rows()] == ["wrong number of cells", ""]
    file.write_text("text\tlabel\nschön\tja\n", encoding="utf-16")
    assert _values(Delimited(file)) == [{"text": "schön", "label": "ja"}]


def test_bad_csv_rows_cost_themselves(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b'text,label\nok,a\ncaf\xe9,a\none,two,three\n"x"y,a\nlast,b\n')
    rows = list(Delimited(file).rows())
    assert [row.reason for row in rows] == ["", "not UTF-8", "wrong number of cells", "not CSV", ""]
    assert [row.number for row in rows] == [2, 3, 4, 5, 6]  # as an editor counts: 1 is the header
    assert rows[1].raw == "caf\\xe9,a"


def test_a_quote_that_is_never_closed_stops(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('text,label\nok,a\n"open,b\nlost,c\n')
    with pytest.raises(SourceError, match="line 3 is never closed"):
        list(Delimited(file).rows())


def test_headers_of_csv(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label,text\n")
    with pytest.raises(SourceError, match="column 'text' twice"):
        list(Delimited(file).rows())
    file.write_text("")
    with pytest.raises(SourceError, match="is empty"):
        list(Delimited(file).rows())


def test_jsonl_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = '{"text": "a\\u2028b", "label": "x"}'
    file.write_bytes(
        b"\xef\xbb\xbf" + f"{good}\n\n[1]\n{{\n{'[' * 100_000}\n".encode() + b'{"text": "\xff"}\n' + good.encode()
    )
    rows = list(JsonLines(file).rows())
    assert [row.number for row in rows] == [1, 3, 4, 5, 6, 7]
    assert [row.reason for row in rows] == ["", "not an object", "not JSON", "not JSON", "not UTF-8", ""]
    assert rows[0].default_id == "rows-1"


def test_a_json_array_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('\n[{"text": "a"}]'.lstrip())
    with pytest.raises(SourceError, match="one JSON array"):
        list(JsonLines(file).rows())


def test_media_are_checked_and_decoded(
    tmp_path: Path, make_png: Callable[..., bytes], make_wav: Callable[..., bytes]
) -> None:
    (tmp_path / "ok.png").write_bytes(make_png())
    (tmp_path / "cut.png").write_bytes(make_png(size=(64, 64), format="BMP")[:5000])
    (tmp_path / "cut.flac").write_bytes(make_wav(format="FLAC")[:2000])
    (tmp_path / "long.wav").write_bytes(make_wav(seconds=61.0, rate_hz=8000))
    base: dict[str, Any] = {"text": "?", "label": "a"}
    extra: list[dict[str, Any]] = [
        {"image": "ok.png"},
        {"image": "cut.png"},
        {"audio": "cut.flac"},
        {"audio": "long.wav"},
        {"image": "gone.png"},
        {"image": "data:image/png;base64,!!"},
        {"label": None},
        {"task": "regress"},
        {"text": "\ud800"},
        {"spans": [{"start": "x"}]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(base | more) for more in extra))
    rows = _rows(Table(JsonLines(file)))
    reasons = [row.reason if isinstance(row, BadRow) else "" for row in rows]
    assert reasons == [
        "", "image damaged", "audio damaged", "audio over a limit", "image cannot be read", "image cannot be read",
        "no label", "another task", "does not fit the schema", "does not fit the schema",
    ]  # fmt: skip
    good = rows[0]
    assert isinstance(good, GoodRow)
    assert good.record.images[0].bytes == make_png()
    assert good.record.messages[0].content == "<image> ?"
    bad = rows[4]
    assert isinstance(bad, BadRow)
    assert (bad.number, bad.id, bad.raw) == (5, "rows-5", base | {"image": "gone.png"})
    assert "gone.png" in bad.message


def test_columns_are_renamed_and_others_kept_for_slices(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("question,answer,label,shop,note\nwhat?,yes,old,north," + "x" * 300 + "\n")
    table = Table(Delimited(file), columns={"text": "question", "label": "answer"}, group_by="shop")
    (row,) = _rows(table)
    assert isinstance(row, GoodRow)
    assert row.record.target.label == "yes"
    assert row.record.messages[0].content == "what?"
    assert row.record.meta == {"shop": "north", "group": "north"}


def test_a_csv_cell_may_hold_json(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    (tmp_path / "a.png").write_bytes(make_png())
    file = tmp_path / "rows.csv"
    file.write_text('text;images;label\nwhich?;"[""a.png"", ""a.png""]";x\nwhich?;[a.png;y\n')
    good, bad = _rows(Table(Delimited(file)))
    assert isinstance(good, GoodRow)
    assert len(good.record.images) == 2
    assert isinstance(bad, BadRow)
    assert bad.reason == "not JSON"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": {"text": "qestion"}}, "'qestion' (--map text=qestion); it has question, answer; the nearest is"),
        ({}, "no column 'label' (the right answer)"),
        ({"columns": {"label": "answer"}}, "no column 'text' (what is asked"),
        ({"columns": {"label": "answer", "text": "question"}, "group_by": "shop"}, "no column 'shop' (--group-by)"),
        ({"columns": {"lable": "answer"}}, "'lable' is no field of a record: did you mean 'label'?"),
    ],
)  # fmt: skip
def test_a_missing_column_is_named(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\na,b\n")
    with pytest.raises(SourceError, match=re.escape(words)):
        Table(Delimited(file), **options)


def test_two_rows_with_one_id(tmp_path: Path) -> None:
    for name, ids in (("a.jsonl", (1, 2)), ("b.jsonl", (3, 2))):
        (tmp_path / name).write_text("\n".join(json.dumps({"id": id, "text": "t", "label": "l"}) for id in ids))
    with pytest.raises(SourceError, match=r"two rows have the id '2': .*a.jsonl row 2 and .*b.jsonl row 2"):
        Table(JsonLines(tmp_path / "a.jsonl"), JsonLines(tmp_path / "b.jsonl", "test-"))


def test_splits_that_a_source_names(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    splits = ["train", "VAL", "dev", "testing", "", "holdout"]
    file.write_text("\n".join(json.dumps({"text": "t", "label": "l", "split": split}) for split in splits))
    table = Table(JsonLines(file))
    assert table.splits == {"train", "validation", "test"}
    found = [row.record.split if isinstance(row, GoodRow) else row.reason for row in _rows(table)]
    assert found == ["train", "validation", "validation", "test", "unknown split", "unknown split"]
    with pytest.raises(SourceError, match="leave out --test"):
        Table(JsonLines(file), JsonLines(file, "test-"))


def test_folder_of_labels(tmp_path: Path, make_png: Callable[..., bytes], make_wav: Callable[..., bytes]) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label / "more").mkdir(parents=True)
        (tmp_path / "pets" / label / "1.PNG").write_bytes(make_png())
        (tmp_path / "pets" / label / "more" / "2.wav").write_bytes(make_wav())
        (tmp_path / "pets" / label / ".DS_Store").write_bytes(b"x")
    (tmp_path / "pets" / "cat" / "notes.docx").write_bytes(b"x")
    rows = _rows(Table(Folder(tmp_path / "pets", seed=0)))
    found = sorted(
        (row.record.id, row.record.target.label, row.record.modalities) for row in rows if isinstance(row, GoodRow)
    )
    assert found == [
        ("cat/1.PNG", "cat", "image"), ("cat/more/2.wav", "cat", "audio"),
        ("dog/1.PNG", "dog", "image"), ("dog/more/2.wav", "dog", "audio"),
    ]  # fmt: skip
    assert [row.reason for row in rows if isinstance(row, BadRow)] == ["unknown kind of file"]


def test_folder_with_splits(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    for split in ("train", "test"):
        (tmp_path / "set" / split / "cat").mkdir(parents=True)
        (tmp_path / "set" / split / "cat" / "1.png").write_bytes(make_png())
    table = Table(Folder(tmp_path / "set", seed=0))
    assert table.splits == {"train", "test"}
    assert {row.record.split for row in _rows(table) if isinstance(row, GoodRow)} == {"train", "test"}
    with pytest.raises(SourceError, match="LABEL/FILE"):
        Folder(tmp_path / "set" / "train" / "cat", seed=0)


def test_parquet_of_hugging_face(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    image = pa.array([{"bytes": make_png(), "path": "a.png"}] * 3)
    table = pa.table({"image": image, "label": pa.array([1, 0, -1])})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        pq.write_table(table, tmp_path / "data" / name)
    source = Table(Parquet(tmp_path / "data"))
    assert source.splits == {"train", "test"}
    rows = _rows(source)
    labels = Counter(row.record.target.label for row in rows if isinstance(row, GoodRow))
    assert labels == {"dog": 2, "cat": 2}
    assert [row.reason for row in rows if isinstance(row, BadRow)] == ["no label"] * 2
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match="cannot be read as Parquet"):
        Table(Parquet(tmp_path / "broken.parquet"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("jsnol:x", "did you mean jsonl:PATH?"),
        ("easyvqa", "did you mean easy_vqa?"),
        ("csv", "did you mean csv:PATH?"),
        ("csv:not/there.csv", "not/there.csv does not exist"),
    ],
)
def test_a_source_that_is_not_known(storage: Path, source: str, words: str) -> None:
    with pytest.raises(SourceError, match=re.escape(words)):
        choose(source)


def test_relative_paths_are_below_the_root(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=f"did you mean {re.escape(str(tmp_path / 'rows.csv'))}"):
        choose("csv:rows.csv")


# easy-VQA


@pytest.fixture(scope="module")
def easy() -> EasyVqa:
    pytest.importorskip("easy_vqa", reason="the demo's data are an optional extra")
    return EasyVqa(seed=0, validation_share=0.1)


def test_training_holds_each_question_once(easy: EasyVqa) -> None:
    plans = [plan for plan in easy.plans if plan.split != "test"]
    assert len({plan.id for plan in plans}) == len(plans) == 38_575
    training = [plan for plan in plans if plan.split == "train"]
    spoken = sum(plan.form == "speech" for plan in training) / len(training)
    assert abs(spoken - 0.5) < 0.02
    for form in ("text", "speech"):
        part = [plan.blind for plan in training if plan.form == form]
        assert abs(sum(part) / len(part) - 0.12) < 0.01
    assert all((plan.clip is not None) == (plan.form != "text") for plan in plans)


def test_validation_is_cut_by_image(easy: EasyVqa) -> None:
    images = {
        split: {plan.question.image_id for plan in easy.plans if plan.split == split}
        for split in ("train", "validation")
    }
    assert not images["train"] & images["validation"]
    assert len(images["validation"]) == 400
    forms = Counter(plan.form for plan in easy.plans if plan.split == "validation")
    assert set(forms) == {"text", "speech_known"}


def test_the_test_split_holds_every_form(easy: EasyVqa) -> None:
    plans = [plan for plan in easy.plans if plan.split == "test"]
    forms = Counter(plan.form for plan in plans)
    assert forms == {"text": 9673, "speech_known": 9673, "speech_unseen": 9673, "paraphrase": 2000}
    assert not any(plan.blind for plan in plans)
    assert {plan.question.family for plan in plans if plan.form == "paraphrase"} == {
        "exist", "exist_not", "color", "shape", "shape_of_color",
    }  # fmt: skip


def test_no_clip_of_training_is_heard_in_the_test(easy: EasyVqa) -> None:
    clips = {
        split: {plan.clip for plan in easy.plans if plan.split == split and plan.clip} for split in ("train", "test")
    }
    shared = clips["train"] & clips["test"]
    assert len(shared) < 10  # two draws of speed and pitch may fall together
    voices = Recipe.load().voices
    assert {clip.voice for clip in clips["train"]} == set(voices.training)
    assert {plan.clip.voice for plan in easy.plans if plan.form == "speech_unseen" and plan.clip} == set(voices.unseen)


def test_the_plan_follows_from_the_seed(easy: EasyVqa) -> None:
    assert list(EasyVqa(seed=0, validation_share=0.1).plans) == list(easy.plans)
    assert list(EasyVqa(seed=1, validation_share=0.1).plans) != list(easy.plans)


def test_paraphrases_never_occur_in_training(easy: EasyVqa) -> None:
    trained = {plan.question.text for plan in easy.plans if plan.split != "test"}
    assert len(trained) == 107
    wordings = Recipe.load().wordings
    assert all(len(set(lines)) >= 6 for lines in wordings.values())
    for plan in easy.plans:
        if plan.form == "paraphrase":
            assert plan.text not in trained
            assert plan.question.subject in plan.text
            negated = re.search(r"\b(no|not|without)\b", plan.text) is not None
            assert negated == (plan.question.family == "exist_not")
    for question in {plan.question.text: plan.question for plan in easy.plans}.values():
        for wording in wordings[question.family]:
            text = reword(question, wording)
            assert text not in trained
            assert ("{x}" in wording) == bool(question.subject)
            assert "{" not in text


@pytest.mark.parametrize(
    ("text", "family", "subject"),
    [
        ("is there not a blue shape in the image?", "exist_not", "blue shape"),
        ("is a circle present?", "exist", "circle"),
        ("is no teal shape present?", "exist_not", "teal shape"),
        ("what is the color of the triangle?", "color", "triangle"),
        ("what shape is in the image?", "shape", ""),
        ("what is the brown shape?", "shape_of_color", "brown"),
    ],
)
def test_families(text: str, family: str, subject: str) -> None:
    assert family_of(text) == (family, subject)


def test_an_unknown_question_stops() -> None:
    with pytest.raises(SourceError, match="of no family known here"):
        family_of("how many shapes are there?")


def test_voices_of_the_recipe() -> None:
    pytest.importorskip("espeakng_loader")
    from jobs.speech import Synthesizer

    voices = Recipe.load().voices
    assert len(set(voices.training)) >= 10
    assert len(set(voices.unseen)) == 2
    synthesizer = Synthesizer()
    for voice in (*voices.training, *voices.unseen):
        synthesizer.check_voice(voice)


@pytest.mark.parametrize("unseen", ["en-us+f9", "en-029+f3", "en-us"])
def test_an_unseen_voice_that_training_has_is_refused(unseen: str) -> None:
    with pytest.raises(ValueError, match="shares its accent or its variant"):
        Voices(training=("en-us+f3", "en+m1"), unseen=(unseen,))


def test_a_wrong_recipe_names_the_key(tmp_path: Path) -> None:
    raw = yaml.safe_load(RECIPE_FILE.read_text())
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw | {"speech_share": 2}))
    with pytest.raises(SourceError, match=r"recipe\.yaml cannot be used: speech_share"):
        Recipe.load(file)
    file.write_text(yaml.safe_dump(raw | {"voises": {}}))
    with pytest.raises(SourceError, match="voises"):
        Recipe.load(file)


def test_a_wording_of_training_is_refused() -> None:
    pytest.importorskip("easy_vqa")
    raw = Recipe.load().model_dump()
    raw["wordings"]["exist"] = ("is there a {x}?",)
    with pytest.raises(SourceError, match="occurs in training"):
        EasyVqa(seed=0, validation_share=0.1, recipe=Recipe.model_validate(raw))


def test_records_of_easy_vqa() -> None:
    pytest.importorskip("easy_vqa")
    pytest.importorskip("espeakng_loader")
    rows = [row.record for row in EasyVqa(seed=0, validation_share=0.2, limit=30).rows(1) if isinstance(row, GoodRow)]
    assert len(rows) == 30 + 30 * 4
    contents = Counter(record.messages[0].content for record in rows if record.audios)
    assert set(contents) <= {"<image> <audio>", "<audio>"}
    for record in rows:
        assert record.meta["group"] == record.meta["image_id"]
        assert ("voice" in record.meta) == ("transcript" in record.meta) == bool(record.audios)
        assert ("<image>" in record.messages[0].content) == bool(record.images)
        if record.audios:
            assert record.meta["transcript"] == record.meta["question"]
