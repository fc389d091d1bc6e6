"""Strict CSV: what lenient readers change silently stays as it is, or is refused with its row."""

import csv
import gzip
import hashlib
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hilum.core.errors import HilumError, ManifestError, MissingColumnError, PathError
from hilum.data import tables
from hilum.data.tables import read_csv, read_list


@pytest.fixture
def write(tmp_path):
    def make(content: bytes | str):
        path = tmp_path / "table.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def test_values_stay_text(write):
    """The five things a lenient reader changes: leading zeros, NA, long integers, blanks, quotes."""
    table = read_csv(write('id,label,long\n00012,NA,9007199254740993\n0012,None,9007199254740992\n,"a ""b"", c",\n'))
    assert table.frame["id"].to_list() == ["00012", "0012", ""]
    assert table.frame["label"].to_list() == ["NA", "None", 'a "b", c']
    assert table.frame["long"].to_list() == ["9007199254740993", "9007199254740992", ""]


def test_bom_crlf_and_last_lines_are_fine(write):
    table = read_csv(write(b'\xef\xbb\xbfid,text\r\n1,x\r\n2,"two\r\nlines"\r\n\r\n'))
    assert table.columns == ["id", "text"]
    assert table.frame["text"].to_list() == ["x", "two\r\nlines"]


def test_trailing_unnamed_column_is_dropped(write):
    assert read_csv(write("a,b,\n1,2,\n3,4,\n")).columns == ["a", "b"]


def test_rows_may_do_without_unnamed_columns_at_the_end(write):
    """The published boxes of NIH have nine names in the header, three of them empty, and six fields in every row."""
    assert read_csv(write("a,b [x,y],,,\n1,2,3\n4,5,6\n")).frame.rows() == [("1", "2", "3"), ("4", "5", "6")]
    assert read_csv(write("a,b,,\n1,2,,\n")).columns == ["a", "b"]
    for ragged in ("a,b,,\n1,2\n1,2,,\n", "a,b,,\n1,2,\n1,2,\n", "a,b,\n1\n"):
        with pytest.raises(ManifestError, match="fields, the header has"):
            read_csv(write(ragged))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", "row 3: 3 fields, the header has 2"),
        ("a,b\n1,2\n1\n", "row 3: 1 fields"),
        ("a,b\n1,2\n\n1,3\n", "row 3: 1 fields"),
        ('a,b\n1,2\n"1,3\n', "row 3: a quotation mark"),
        ('a,b\n1,2\n1,5"2\n', "row 3: a quotation mark"),
        ('a,b\n"x" y,2\n', "row 2: a quotation mark"),
        ("a,a\n1,2\n", "repeats 'a'"),
        ("a;b\n1;2\n", "semicolons"),
        ("a\tb\n1\t2\n", "tabs"),
        (b"\xff\xfea\x00,\x00b\x00", "UTF-16"),
        (b"a,b\n1,2\n1,\x00\n", "row 3: holds a NUL"),
        (b"a,b\n1,caf\xe9\n", "row 2: not UTF-8"),
        ("a,b\r1,2\r", "carriage returns"),
        ("a,b\n", "no rows"),
        ("", "is empty"),
        (" \n\n", "is empty"),
    ],
)
def test_malformed_files_are_named(write, content, message):
    with pytest.raises(ManifestError, match=message):
        read_csv(write(content))


def test_missing_column_lists_found_expected_and_nearest(write):
    with pytest.raises(MissingColumnError) as caught:
        read_csv(write("dicom_ID,path\n1,x\n"), ("dicom_id", "path"))
    text = str(caught.value)
    assert "'dicom_id' (nearest: 'dicom_ID')" in text
    assert "Expected dicom_id, path" in text
    assert "Found: dicom_ID, path" in text


def test_repeated_key_names_rows_and_not_the_value(write):
    with pytest.raises(ManifestError, match="rows 2, 4") as caught:
        read_csv(write("id,x\nsecret-7,1\nb,1\nsecret-7,2\n"), key="id")
    assert "secret-7" not in str(caught.value)


def test_absent_file_is_a_path_error(tmp_path):
    with pytest.raises(PathError, match="does not exist"):
        read_csv(tmp_path / "none.csv")


@pytest.mark.parametrize("name", ["t.csv.gz", "T.CSV.GZ"])
def test_gzip_is_read_as_its_text(tmp_path, name):
    packed = gzip.compress(b"id,x\n00012,a\n", mtime=0) + gzip.compress("2,\u00e9\n".encode(), mtime=0)  # two members
    (tmp_path / name).write_bytes(packed)
    table = read_csv(tmp_path / name, key="id")
    assert table.frame.rows() == [("00012", "a"), ("2", "\u00e9")]
    assert table.sha256 == hashlib.sha256(packed).hexdigest()  # of the file, as SHA256SUMS.txt has it


def test_gzip_cut_anywhere_or_changed_is_refused(tmp_path):
    text = b"id,x\n" + b"".join(b"%d,%d\n" % (n, n * n) for n in range(40))
    packed = gzip.compress(text, mtime=0)
    path = tmp_path / "t.csv.gz"
    for end in range(1, len(packed)):
        path.write_bytes(packed[:end])
        with pytest.raises(ManifestError):
            read_csv(path)
    for place in range(10, len(packed)):  # after the header, whose time and name do not matter
        path.write_bytes(packed[:place] + bytes([packed[place] ^ 0x55]) + packed[place + 1 :])
        with pytest.raises(ManifestError):
            read_csv(path)
    path.write_bytes(text)
    with pytest.raises(ManifestError, match="not whole gzip"):
        read_csv(path)
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(ManifestError, match="is empty"):
        read_csv(path)


def test_gzip_bomb_is_refused_at_the_ceiling(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ALWAYS_UNPACKED", 1000)
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n" + b"0,0\n" * 200_000))
    assert path.stat().st_size * tables.LARGEST_RATIO < 800_000  # denser than any real table
    with pytest.raises(ManifestError, match="unpack to more than"):
        read_csv(path)
    monkeypatch.setattr(tables, "ALWAYS_UNPACKED", 800_004)
    assert read_csv(path).frame.height == 200_000


def test_list_refuses_repeats(write):
    assert read_list(write("a.png\r\n\r\n b.png \n")) == ["a.png", "b.png"]
    with pytest.raises(ManifestError, match="1 names twice"):
        read_list(write("a\na\n"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | st.text(',"\n\r;ab\x00', max_size=30).map(str.encode))
def test_any_bytes_are_a_table_or_an_error_of_ours(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(content)
    try:
        table = read_csv(path)
    except HilumError:
        return
    assert table.frame.height > 0
    assert table.frame.null_count().sum_horizontal().to_list() in ([0], [])


cells = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r", exclude_categories=("Cs",)), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(cells, min_size=2, max_size=2), min_size=1, max_size=5))
def test_agrees_with_the_csv_module(tmp_path_factory, rows):
    """Whatever the standard library writes comes back cell for cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([["a", "b"], *rows])
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    assert read_csv(path).frame.rows() == [tuple(row) for row in rows]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["x", ""]), min_size=1, max_size=4), min_size=1, max_size=6))
def test_field_counts_agree_with_the_csv_module(tmp_path_factory, rows):
    """Planted ragged rows: refused exactly when some row has another length than the header."""
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    rows = [["x", *row] for row in rows]  # a first field that is not empty, so that no line is blank
    path.write_text("a,b,c\n" + "".join(",".join(row) + "\n" for row in rows))
    if all(len(row) == 3 for row in rows):
        assert read_csv(path).frame.height == len(rows)
    else:
        first = next(number for number, row in enumerate(rows, start=2) if len(row) != 3)
        with pytest.raises(ManifestError, match=f"row {first}:"):
            read_csv(path)


def outcome(path):
    try:
        table = read_csv(path)
    except HilumError as error:
        return str(error)
    return table.frame.rows()


@settings(max_examples=150, deadline=None)
@given(st.text(',"\n\rab', max_size=40), st.integers(1, 9))
def test_blocks_do_not_change_the_outcome(tmp_path_factory, text, block):
    """A quotation, a record or a field may lie across blocks: same table, or same message with the same row."""
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_text("a,b\n" + text, newline="")
    whole = outcome(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BLOCK", block)
        assert outcome(path) == whole


def test_only_the_columns_asked_for_are_kept_and_all_are_checked(write):
    assert read_csv(write('a,b,c\n1,"x\ny",3\n4,z,6\n'), only=("c", "a")).frame.rows() == [("1", "3"), ("4", "6")]
    with pytest.raises(ManifestError, match="row 3: a quotation mark"):
        read_csv(write('a,b,c\n1,x,3\n4,z"z,6\n'), only=("a",))
