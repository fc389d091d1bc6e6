"""Tables and paths as they should not be: each is read exactly or refused by name, never changed in silence."""

import codecs
import os
import socket
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pytest
from damage_inputs import rasters

from hilum.core.errors import EmptyStudyError, HilumError, ManifestError, MissingColumnError, PathError
from hilum.core.errors import UnknownLabelError as UnknownLabel
from hilum.data.images import read_image
from hilum.data.rows import SourceOptions, SourceRows
from hilum.data.sources import folder

PNG = rasters()["png"]
NFC, NFD = unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")
LONG = "n" * 300 + ".png"


@dataclass(frozen=True)
class Case:
    """A folder of a table and files, and what reading it must give: rows, or an error that says this."""

    table: bytes | str | None
    error: type[HilumError] | None = None
    says: str = ""
    rows: dict[str, list[object]] = field(default_factory=dict)
    notes: str = ""
    files: tuple[str, ...] = ("1.png", "2.png")
    prepare: Callable[[Path], object] | None = None
    allow_missing: bool = False


def refused(table: bytes | str | None, error: type[HilumError], says: str, **options: object) -> Case:
    return Case(table, error, says, **options)  # type: ignore[arg-type]


def read(table: bytes | str | None, notes: str = "", files: tuple[str, ...] = ("1.png", "2.png"), prepare=None,
         allow_missing: bool = False, **rows: list[object]) -> Case:  # fmt: skip
    return Case(table, rows=rows, notes=notes, files=files, prepare=prepare, allow_missing=allow_missing)


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def prepare(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        make(root / name)

    return prepare


def listening(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def outside(root: Path) -> None:
    (root.parent / "away.png").write_bytes(PNG)
    (root / "2.png").unlink()
    (root / "2.png").symlink_to(root.parent / "away.png")


def not_utf8(root: Path) -> None:
    Path(os.fsdecode(os.fsencode(root) + b"/\xff.png")).touch()


def circle(root: Path) -> None:
    (root / "a.png").symlink_to(root / "b.png")
    (root / "b.png").symlink_to(root / "a.png")


TABLES = {
    # the sixteen that lenient readers change or lose
    "leading zeros": read("path,patient_id\n1.png,00012\n2.png,12\n", patient_id=["00012", "12"]),
    "NA as an id": read("path,patient_id\n1.png,NA\n2.png,None\n", patient_id=["NA", "None"]),
    "NA as a label": refused("path,Edema\n1.png,NA\n2.png,1\n", UnknownLabel, "row 2: column 'Edema' holds 'NA'"),
    "long integers": read("path,patient_id\n1.png,9007199254740993\n2.png,9007199254740992\n",
                          patient_id=["9007199254740993", "9007199254740992"]),
    "38-digit ids": read(f"path,study_id,patient_id\n1.png,{'1' * 38},a\n2.png,{'1' * 37}2,a\n",
                         study_id=["1" * 38, "1" * 37 + "2"]),
    "a blank id among numbers": refused("path,patient_id\n1.png,7\n2.png,\n", ManifestError, "row 3: 'patient_id' is"),
    "a row that is longer": refused("path,Edema\n1.png,1\n2.png,0,1\n", ManifestError, "row 3: 3 fields"),
    "every row longer": refused("path,Edema\n1.png,1,0\n2.png,0,1\n", ManifestError, "row 2: 3 fields.*2 such rows"),
    "a row that is shorter": refused("path,Edema\n1.png,1\n2.png\n", ManifestError, "row 3: 1 fields"),
    "semicolons": refused("path;Edema\n1.png;1\n", ManifestError, "semicolons"),
    "a NUL": refused(b"path,patient_id\n1.png,a\x00b\n", ManifestError, "row 2: holds a NUL"),
    "a repeated column": refused("path,Edema,Edema\n1.png,1,0\n", ManifestError, "repeats 'Edema'"),
    "UTF-16, little": refused(codecs.BOM_UTF16_LE + "path\n1.png\n".encode("utf-16-le"), ManifestError, "UTF-16"),
    "UTF-16, big": refused(codecs.BOM_UTF16_BE + "path\n1.png\n".encode("utf-16-be"), ManifestError, "UTF-16"),
    "UTF-16 without a mark": refused("path\n1.png\n".encode("utf-16-le"), ManifestError, "NUL"),
    "Latin-1": refused("path,patient_id\n1.png,José\n".encode("latin-1"), ManifestError, "row 2: not UTF-8"),
    "an open quotation mark": refused('path,patient_id\n1.png,"a\n2.png,b\n', ManifestError, "row 2: a quotation"),
    "an empty table": refused("", ManifestError, "is empty"),
    "a BOM": read(b"\xef\xbb\xbfpath,Edema\n1.png,1\n2.png,0\n", **{"label.Edema": [1, 0]}),
    "CRLF": read(b"path,Edema\r\n1.png,1\r\n2.png,0\r\n", **{"label.Edema": [1, 0]}),
    # more of the kind
    "two BOMs": refused(b"\xef\xbb\xbf\xef\xbb\xbfpath\n1.png\n", MissingColumnError, "lacks 'path'"),
    "CR alone": refused("path,Edema\r1.png,1\r", ManifestError, "carriage returns"),
    "tabs": refused("path\tEdema\n1.png\t1\n", ManifestError, "tabs"),
    "a header and nothing": refused("path,Edema\n", ManifestError, "no rows"),
    "no header": refused("1.png,1\n2.png,0\n", MissingColumnError, "lacks 'path'"),
    "another case in the header": refused("Path,Edema\n1.png,1\n", MissingColumnError, "nearest: 'Path'"),
    "an invisible space in the header": refused("path\u200b,Edema\n1.png,1\n", MissingColumnError, "lacks 'path'"),
    "spaces around the header": read("path , Edema\n1.png,1\n2.png,0\n", **{"label.Edema": [1, 0]}),
    "a blank line between": refused("path,Edema\n1.png,1\n\n2.png,0\n", ManifestError, "row 3: 1 fields"),
    "blank lines at the end": read("path,Edema\n1.png,1\n2.png,0\n\n\n", **{"label.Edema": [1, 0]}),
    "no line end at the end": read("path,Edema\n1.png,1\n2.png,0", **{"label.Edema": [1, 0]}),
    "a column without a name": read("path,Edema,\n1.png,1,\n2.png,0,\n", **{"label.Edema": [1, 0]}),
    "a comma within quotes": read('path,patient_id\n1.png,"a,b"\n2.png,c\n', patient_id=["a,b", "c"]),
    "a line end within quotes": read('path,sex\n1.png,"F\n"\n2.png,M\n', sex=["F\n", "M"]),
    "text after a quotation mark": refused('path,Edema\n"1.png"x,1\n', ManifestError, "row 2: a quotation mark"),
    "bytes that are not UTF-8 late": refused(b"path,sex\n1.png,F\n2.png,\xed\xa0\x80\n", ManifestError, "row 3: not"),
    "overlong UTF-8": refused(b"path,sex\n1.png,\xc0\xaf\n", ManifestError, "row 2: not UTF-8"),
    "a label in words": refused("path,Edema\n1.png,yes\n2.png,1\n", UnknownLabel, "row 2.*'yes'"),
    "a label in full-width digits": refused("path,Edema\n1.png,\uff11\n2.png,1\n", UnknownLabel, "row 2"),
    "a label with a space": refused("path,Edema\n1.png, 1\n2.png,1\n", UnknownLabel, "row 2.*' 1'"),
    "a label in scientific form": refused("path,Edema\n1.png,1e0\n2.png,1\n", UnknownLabel, "row 2.*'1e0'"),
    "a probability": refused("path,Edema\n1.png,0.5\n2.png,1\n", UnknownLabel, "row 2.*'0.5'"),
    "a formula": refused("path,Edema\n1.png,=1+1\n2.png,1\n", UnknownLabel, "row 2"),
    "a label of two": refused("path,Edema\n1.png,2\n2.png,1\n", UnknownLabel, "row 2.*'2'"),
    "labels as floats": read("path,Edema\n1.png,1.0\n2.png,-1.0\n", **{"label.Edema": [1, -2]}),
    "blank labels": read("path,Edema\n1.png,\n2.png,1\n", **{"label.Edema": [-1, 1]}),
    "two spellings of a finding": refused("path,Edema,EDEMA\n1.png,1,1\n", ManifestError, "two columns for Edema"),
    "a row twice": refused("path,Edema\n1.png,1\n1.png,1\n", ManifestError, "rows 2, 3"),
    "a file twice, spelt in two ways": refused("path\n1.png\n./1.png\n", ManifestError, "rows 2, 3"),
    "a split that is none": refused("path,split\n1.png,holdout\n", ManifestError, "'holdout'"),
    "an html page": refused("<!DOCTYPE html>\n<html></html>\n", MissingColumnError, "lacks 'path'"),
    "a very long cell": read(f"path,patient_id\n1.png,{'x' * 10**6}\n2.png,y\n", patient_id=["x" * 10**6, "y"]),
    "a wide table": read("path," + ",".join(f"f{n}" for n in range(600)) + "\n1.png" + ",1" * 600 + "\n2.png"
                         + ",0" * 600 + "\n", **{"label.f599": [1, 0]}),
}  # fmt: skip

PATHS = {
    "absolute": refused("path\n/etc/passwd\n", PathError, "row 2: the path is absolute"),
    "up and out": refused("path\n1.png\n../x.png\n", PathError, "row 3"),
    "down, up and out": refused("path\na/../../x.png\n", PathError, "row 2"),
    "up and back in": refused("path\na/../1.png\n", PathError, "row 2"),
    "a drive": refused("path\nC:/x.png\n", PathError, "row 2"),
    "a share": refused("path\n\\\\server\\x.png\n", PathError, "row 2"),
    "backslashes": refused("path\na\\1.png\n", PathError, "row 2"),
    "a line end": refused('path\n"1\n.png"\n2.png\n', PathError, "row 2"),
    "a tab": refused("path,sex\n1\t.png,F\n", PathError, "row 2"),
    "an escape sequence": refused("path\n\x1b[2J.png\n", PathError, "row 2"),
    "no path": refused("path,sex\n,F\n", EmptyStudyError, "row 2: 'path' is empty"),
    "the folder itself": refused("path\n.\n1.png\n", PathError, "1 of 2 listed.*row 2"),
    "a trailing slash": refused("path\n1.png\n2.png/\n", PathError, "1 of 2 listed.*row 3"),
    "spaces around": refused("path\n1.png\n 2.png\n", PathError, "1 of 2 listed.*row 3"),
    "a URL": refused("path\n1.png\nfile:///etc/passwd\n", PathError, "1 of 2 listed.*row 3"),
    "a home": refused("path\n1.png\n~/2.png\n", PathError, "1 of 2 listed.*row 3"),
    "percent signs": refused("path\n1.png\n%2e%2e/2.png\n", PathError, "1 of 2 listed.*row 3"),
    "a name of 300": refused(f"path\n1.png\n{LONG}\n", PathError, "1 of 2 listed.*row 3"),
    "a path of 5000": refused(f"path\n1.png\n{'d/' * 2500}x.png\n", PathError, "1 of 2 listed.*row 3"),
    "another case": refused("path\n1.png\n2.PNG\n", PathError, "1 of 2 listed.*row 3"),
    "another form of the same letters": refused(f"path\n{NFC}\n1.png\n", PathError, "1 of 2 listed.*row 2",
                                                files=(NFD, "1.png")),
    "twins by form": read(f"path\n{NFC}\n{NFD}\n", files=(NFC, NFD), source_relpath=[NFC, NFD]),
    "twins by case": read("path\na.png\nA.png\n", files=("a.png", "A.png"), source_relpath=["a.png", "A.png"]),
    "dots and doubled slashes": read("path\n./a//1.png\na/./2.png\n", files=("a/1.png", "a/2.png"),
                                     source_relpath=["a/1.png", "a/2.png"]),
    "names that only look dangerous": read("path\n..a.png\n-rf.png\n$HOME.png\n*.png\n", source_relpath=[
        "..a.png", "-rf.png", "$HOME.png", "*.png"], files=("..a.png", "-rf.png", "$HOME.png", "*.png")),
    "letters of everywhere": read("path\nф/胸.png\n🩻.png\n", files=("ф/胸.png", "🩻.png"),
                                  source_relpath=["ф/胸.png", "🩻.png"]),
    "suffixes in any case": read(None, files=("a.PNG", "b.JpG", "c.JPEG"), source_relpath=["a.PNG", "b.JpG", "c.JPEG"]),
    "a missing file": refused("path\n1.png\n3.png\n", PathError, "1 of 2 listed.*row 3"),
    "a missing file that may be": read("path\n1.png\n3.png\n", allow_missing=True, source_relpath=["1.png"],
                                       notes="1 of 2 listed images"),
    "all files missing": refused("path\n8.png\n9.png\n", PathError, "None of the 2 listed images"),
    "a folder named like a file": refused("path\n1.png\n2.png\n", PathError, "1 of 2 listed.*row 3",
                                          prepare=replaced("2.png", Path.mkdir)),
    "a pipe": refused("path\n1.png\n2.png\n", PathError, "1 of 2 listed.*row 3", prepare=replaced("2.png", os.mkfifo)),
    "a socket": refused("path\n1.png\n2.png\n", PathError, "1 of 2 listed.*row 3",
                        prepare=replaced("2.png", listening)),
    "a device": refused("path\n1.png\n2.png\n", PathError, "row 3: the image is, or lies behind, a link that leaves",
                        prepare=replaced("2.png", lambda path: path.symlink_to("/dev/zero"))),
    "a link out": refused("path\n1.png\n2.png\n", PathError, "row 3: .*a link that leaves", prepare=outside),
    "a link out, without a table": refused(None, PathError, "1 links that leave it", prepare=outside),
    "a broken link": refused("path\n1.png\n2.png\n", PathError, "1 of 2 listed.*row 3",
                             prepare=replaced("2.png", lambda path: path.symlink_to(path.parent / "none"))),
    "links in a circle": read(None, prepare=circle, source_relpath=["1.png", "2.png"],
                              notes="2 pipes, devices or broken links: left out"),
    "a link to the folder above": read(None, prepare=lambda root: (root / "up").symlink_to(root),
                                       source_relpath=["1.png", "2.png"], notes="1 links inside"),
    "a link to a listed file": read(None, prepare=lambda root: (root / "3.png").symlink_to(root / "1.png"),
                                    source_relpath=["1.png", "2.png"], notes="1 links inside"),
    "a pipe, without a table": read(None, prepare=lambda root: os.mkfifo(root / "3.png"),
                                    source_relpath=["1.png", "2.png"], notes="1 pipes, devices or broken links"),
    "hidden files and others": read(None, files=("1.png", ".2.png", "notes.txt", "x.gif"), source_relpath=["1.png"],
                                    notes="3 other files, hidden or no images by their names: left out"),
    "a name that is not UTF-8": read(None, prepare=not_utf8,
                                     source_relpath=["1.png", "2.png"], notes="1 entries whose names are not UTF-8"),
    "a table that is a folder": read(None, prepare=lambda root: (root / "labels.csv").mkdir(),
                                     source_relpath=["1.png", "2.png"], notes="no table"),
    "no image at all": refused(None, PathError, "holds no image", files=("notes.txt",)),
}  # fmt: skip
CASES = {**TABLES, **PATHS}


def outcome(case: Case, root: Path) -> SourceRows:
    root.mkdir()
    for name in case.files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG)
    if case.table is not None:
        (root / "labels.csv").write_bytes(case.table if isinstance(case.table, bytes) else case.table.encode())
    if case.prepare is not None:
        case.prepare(root)
    return folder.read(SourceOptions("clinic", root, allow_missing=case.allow_missing))


@pytest.mark.parametrize("name", CASES)
def test_hazard(tmp_path, name):
    case = CASES[name]
    if case.error is not None:
        with pytest.raises(case.error, match=case.says) as caught:
            outcome(case, tmp_path / "root")
        assert type(caught.value) is case.error
        return
    rows = outcome(case, tmp_path / "root")
    for column, expected in case.rows.items():
        assert rows.frame[column].to_list() == expected
    assert case.notes in "; ".join(rows.notes)


def test_there_are_enough():
    assert len(CASES) >= 60
    assert sum(case.error is not None for case in CASES.values()) >= 40


def test_a_table_given_by_hand_that_is_no_file(tmp_path):
    """A pipe would be waited for, a device read without end."""
    (tmp_path / "1.png").write_bytes(PNG)
    os.mkfifo(tmp_path / "pipe.csv")
    for table in (tmp_path / "pipe.csv", Path("/dev/zero"), tmp_path):
        with pytest.raises(PathError, match="is a folder, pipe or device"):
            folder.read(SourceOptions("clinic", tmp_path, table=table))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_table_and_a_folder_without_permission(tmp_path):
    (tmp_path / "1.png").write_bytes(PNG)
    (tmp_path / "labels.csv").write_text("path\n1.png\n")
    (tmp_path / "labels.csv").chmod(0)
    with pytest.raises(PathError, match="cannot be read"):
        folder.read(SourceOptions("clinic", tmp_path))


def test_no_permission_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "labels.csv").write_text("path\n1.png\n")

    def deny(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", deny)
    with pytest.raises(PathError, match=r"labels\.csv cannot be read: Permission denied"):
        folder.read(SourceOptions("clinic", tmp_path))


def during(monkeypatch, what: Callable[[Path], object]) -> None:
    """Do something to a file between the look at it and the reading."""
    real = Path.open

    def open_after(self: Path, *args: object, **options: object) -> object:
        if self.name == "x.png":
            monkeypatch.setattr(Path, "open", real)
            what(self)
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", open_after)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (Path.unlink, "missing"),
        (lambda path: path.write_bytes(PNG[:-9]), "truncated"),
        (lambda path: path.write_bytes(b""), "zero_bytes"),
        (lambda path: (path.unlink(), path.mkdir()), "unreadable"),
        (lambda path: path.write_bytes(PNG + PNG), ""),
        (lambda path: path.write_bytes(PNG), ""),
    ],
)
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, what, expected):
    """Whatever is read is judged as a whole: gone, cut or grown."""
    path = tmp_path / "x.png"
    path.write_bytes(PNG)
    whole = read_image(path).pixels
    during(monkeypatch, what)
    if not expected:
        assert pl.Series(read_image(path).pixels.ravel()).equals(pl.Series(whole.ravel()))
        return
    with pytest.raises(HilumError) as caught:
        read_image(path)
    assert caught.value.reason == expected  # type: ignore[attr-defined]
