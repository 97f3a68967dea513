"""Quotes of CSV files: what a stray one swallows is named, and stored by nobody."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.tables.delimited import NEVER_CLOSED, SWALLOWED, TEXT_BEHIND
from shards.tables.reading import TableFormat, read_rows
from shards.tables.rows import BadRow

HEADER = ["image", "patient", "report"]
FORM = TableFormat(key="image")


def read(path: Path, text: str) -> dict[int, str]:
    """Line -> report, or the reason why there is none."""
    path.write_text(text, newline="", encoding="utf-8")
    rows = read_rows(path, HEADER, FORM)
    return {row.line: row.reason if isinstance(row, BadRow) else row["report"] for row in rows}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['0.png,p,"open', "1.png,p,b", "2.png,p,c"], {2: NEVER_CLOSED, 3: "b", 4: "c"}),
        (['0.png,p,"open', "1.png,p,b", '2.png,p,"c, d"'], {2: TEXT_BEHIND, 3: "b", 4: "c, d"}),
        # Closed by chance, so that the file is well-formed: only its lines show what happened.
        (['0.png,p,"open', "1.png,p,b", '2.png,p,c"', "3.png,p,d"], {2: SWALLOWED, 3: "b", 4: 'c"', 5: "d"}),
        (['0.png,p,"open', '1.png,p,"', 'b"'], {2: SWALLOWED, 3: "b"}),
        (['0.png,p,"open', ",p,b", 'no.name,p,c"'], {2: SWALLOWED, 3: "b", 4: 'c"'}),
        (['0.png,"p,a', '1.png,p",b'], {2: SWALLOWED, 3: "b"}),
        (['0.png,p,"a"b', "1.png,p,c"], {2: TEXT_BEHIND, 3: "c"}),
        # A report that is cut off with the file is one bad row, not as many as it has lines.
        (["0.png,p,a", '1.png,p,"FINDINGS: no', "effusion", "at all"], {2: "a", 3: NEVER_CLOSED}),
        (['0.png,p,5" tall'], {2: '5" tall'}),
        (
            ['0.png,p,"FINDINGS: heart, lungs, bones', "", "are normal, clear, whole. See a.png, too", 'x"'],
            {2: "FINDINGS: heart, lungs, bones\n\nare normal, clear, whole. See a.png, too\nx"},
        ),
        (['0.png,p,"a ""b"", c"'], {2: 'a "b", c'}),
    ],
)
def test_quotes(lines: list[str], expected: dict[int, str], tmp_path: Path) -> None:
    assert read(tmp_path / "t.csv", "\n".join([",".join(HEADER), *lines]) + "\n") == expected


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_a_quote_before_a_report_costs_that_row_alone(name: str, tmp_path: Path) -> None:
    sign = "\t" if name == "t.tsv" else ","
    rows = [[f"{n}.png", f"p{n}", f"Report {n}."] for n in range(3000)]
    rows[10][2] = '"' + rows[10][2]
    found = read(tmp_path / name, "\n".join(sign.join(row) for row in [HEADER, *rows]))
    assert found.pop(12) == NEVER_CLOSED
    assert found == {n + 2: f"Report {n}." for n in range(3000) if n != 10}


def test_a_report_before_the_image_column(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('report,image,patient\n"a\nb",0.png,p\n"c,1.png,p\nd",2.png,p\n', encoding="utf-8")
    rows = [row.reason if isinstance(row, BadRow) else row["report"] for row in read_rows(path, HEADER, FORM)]
    assert rows == ["a\nb", SWALLOWED, 'd"']


@pytest.mark.parametrize("key", ["1.2.840.7", "acc12.png", "12"])
def test_a_signature_of_as_many_cells_as_the_header_is_no_row(key: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        f'image,patient,report\n{key},p,"Clear.\nDOE,JOHN,MD"\n{key}1,p,"Clear.\nDOE,JANE,MD\nSeen."\n'
    )
    rows = list(read_rows(path, HEADER, FORM))
    assert [row.reason if isinstance(row, BadRow) else row["report"] for row in rows] == [
        "Clear.\nDOE,JOHN,MD", "Clear.\nDOE,JANE,MD\nSeen.",
    ]  # fmt: skip


def test_prose_that_is_read_as_rows_teaches_nothing_about_rows(tmp_path: Path) -> None:
    text = (
        'image,patient,report\n0.png,p,"Clear.\n1,2,3\nNormal heart, clear lungs, no effusion"\n'
        '4.png,p,"Clear.\nDOE,JOHN,MD"\n5.png,p,"See a.\nLarge heart, old fracture, no effusion\nDone."\n'
    )
    found = read(tmp_path / "t.csv", text)
    assert found[2] == SWALLOWED
    assert found[5] == "Clear.\nDOE,JOHN,MD"
    assert found[7] == "See a.\nLarge heart, old fracture, no effusion\nDone."


@pytest.mark.parametrize(("earlier", "key"), [("1", "nobody"), ("nobody", "1")])
def test_a_line_is_a_row_where_keys_need_no_digit(earlier: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"  # "Doe-" has not the form of a key
    path.write_text(f'image,patient,report\n{earlier},p,Clear.\n{key},p,"Clear.\nDoe-,JOHN,MD"\n')
    rows = list(read_rows(path, HEADER, FORM))
    assert [row.reason for row in rows if isinstance(row, BadRow)][:1] == [SWALLOWED]
    assert "write the table as JSON lines" in SWALLOWED


def test_long_cells_are_read(tmp_path: Path) -> None:
    assert (
        read(tmp_path / "t.csv", f'image,patient,report\n0.png,p,"{"word, " * 60_000}"\n')[2].count("word")
        == 60_000
    )


WORDS = st.lists(
    st.sampled_from(["clear", "no", '"', '""', '5"', ",", ", ", ";", "\t", "\n", "\r\n", "é", "nan"])
)


@settings(max_examples=300)
@given(
    rows=st.lists(st.tuples(WORDS, st.sampled_from(["quoted", "raw", "all"])), min_size=1, max_size=12),
    sign=st.sampled_from([",", "\t", ";"]),
    report_column=st.sampled_from([0, 1, 2]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_no_row_is_lost_and_none_holds_another(
    rows: list[tuple[list[str], str]],
    sign: str,
    report_column: int,
    encoding: str,
    end: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Rows as a good writer makes them, between rows of one that knows no quotes."""
    header = ["image", "patient"]
    header.insert(report_column, "report")
    text = sign.join(header) + end
    for number, (words, style) in enumerate(rows):
        report = " ".join([*words, f"token{number}."])
        if style == "raw":
            report = report.replace("\r", " ").replace("\n", " ").replace(sign, " ")
        line = [f"{number}.png", f"p{number}"]
        line.insert(report_column, report)
        if style == "raw":
            text += sign.join(line) + end
        else:
            buffer = io.StringIO()
            quoting = csv.QUOTE_ALL if style == "all" else csv.QUOTE_MINIMAL
            csv.writer(buffer, delimiter=sign, lineterminator=end, quoting=quoting).writerow(line)
            text += buffer.getvalue()
    path = tmp_path_factory.mktemp("random") / "t.csv"
    path.write_bytes(text.encode(encoding))
    form = TableFormat("utf-8" if encoding == "utf-8-sig" else encoding, sign, key="image")
    read = list(read_rows(path, header, form))
    assert len(read) == len(rows)
    bad = {row.line for row in read if isinstance(row, BadRow)}
    stray = [number for number, (words, style) in enumerate(rows) if style == "raw" and '"' in "".join(words)]
    assert not bad or stray, "a row was rejected though all quotes are right"
    for number, row in enumerate(read):
        if row.line in bad:
            continue
        assert row["image"] == f"{number}.png"
        assert [word for word in row["report"].split() if "token" in word] == [f"token{number}."]
