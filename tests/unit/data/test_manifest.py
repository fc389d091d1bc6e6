"""Several sources to one manifest: ids, findings, splits, provenance."""

import hashlib
import json
from pathlib import Path

import polars as pl
import pytest

from hilum.commands.build import parse_roots
from hilum.core.errors import ConfigError, HilumError, LeakageError, UnknownNameError
from hilum.core.types import image_uid
from hilum.data.label_maps import LabelPolicy
from hilum.data.labels import CXRLT_2024_TASK1, FINDING_SETS, findings_hash, frequency_groups, ordered
from hilum.data.manifest import SOURCES, ManifestOptions, build_manifest, parse_folders, parse_source
from hilum.data.schema import read_manifest, write_manifest


@pytest.fixture
def make(tmp_path):
    def write(name: str, table: str):
        root = tmp_path / name
        root.mkdir()
        (root / "labels.csv").write_text(table)
        for line in table.splitlines()[1:]:
            (root / line.split(",")[0]).touch()
        return parse_source(f"folder:{name}={root}")

    return write


def many(patients: int, header="path,patient_id,Edema,Zebra stripes") -> str:
    lines = [header]
    lines += [f"{p}_{i}.png,{p},{int(p % 5 == 0)},{int(p % 7 == i)}" for p in range(patients) for i in range(2)]
    return "\n".join(lines) + "\n"


def test_ids_are_namespaced_and_rows_sorted(make):
    manifest, _ = build_manifest(
        [make("b", "path,patient_id\n2.png,9\n1.png,9\n"), make("a", "path\n1.png\n")], ManifestOptions()
    )
    frame = manifest.frame
    assert frame["dataset"].to_list() == ["a", "b", "b"]
    assert frame["patient_id"].to_list() == ["a/1.png", "b/9", "b/9"]
    assert frame["study_id"].to_list() == ["a/1.png/1.png", "b/9/1.png", "b/9/2.png"]
    assert frame["image_id"].to_list() == ["1.png", "1.png", "2.png"]
    assert frame["image_uid"].to_list() == [
        image_uid(d, i) for d, i in (("a", "1.png"), ("b", "1.png"), ("b", "2.png"))
    ]


def test_findings_are_the_union_in_the_releases_order(make):
    specs = [make("a", "path,Zoster,Pneumonia\n1.png,1,0\n"), make("b", "path,Atelectasis,Alpha\n1.png,1,0\n")]
    manifest, _ = build_manifest(specs, ManifestOptions())
    assert manifest.findings == ("Atelectasis", "Pneumonia", "Alpha", "Zoster")
    assert manifest.labels().tolist() == [[-1, 0, -1, 1], [1, -1, 0, -1]]  # what a source does not label is unknown


def test_fixed_findings(make):
    spec = make("a", many(30))
    manifest, notes = build_manifest([spec], ManifestOptions(findings="cxrlt2024-task1"))
    assert manifest.findings == CXRLT_2024_TASK1
    assert notes == ["a: labels not asked for, left out: Zebra stripes"]
    chosen, _ = build_manifest([spec], ManifestOptions(findings="Zebra stripes,edema"))
    assert chosen.findings == ("Zebra stripes", "Edema")
    everything, _ = build_manifest([spec], ManifestOptions())
    for other in (manifest, chosen):  # which findings are kept does not move patients
        assert other.frame["split_project"].equals(everything.frame["split_project"])


@pytest.mark.parametrize("asked", ["cxrlt2024-task9", "Edema,Edma", "Edema,Edema"])
def test_unknown_findings(make, asked):
    with pytest.raises(ConfigError):
        build_manifest([make("a", many(3))], ManifestOptions(findings=asked))


def test_another_dataset_moves_nobody(make):
    first, second = make("a", many(40)), make("b", many(20))
    alone, _ = build_manifest([first], ManifestOptions(seed=3))
    both, _ = build_manifest([second, first], ManifestOptions(seed=3))
    assert both.frame.filter(pl.col("dataset") == "a")["split_project"].equals(alone.frame["split_project"])


def test_project_split_marks_ssl_and_survives_the_file(make, tmp_path):
    manifest, _ = build_manifest([make("a", many(100))], ManifestOptions())
    frame = manifest.frame
    assert frame.group_by("split_project").len().sort("split_project").rows() == [
        ("test", 40),
        ("train", 140),
        ("val", 20),
    ]
    assert (frame["ssl_ok"] == (frame["split_project"] == "train")).all()
    write_manifest(manifest, tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "m.parquet").frame.equals(frame)


def test_a_given_split_is_kept_unless_a_project_split_is_asked_for(make):
    table = "path,patient_id,split\n" + "".join(f"{i}.png,{i},{'test' if i < 9 else 'train'}\n" for i in range(30))
    spec = make("a", table)
    given, _ = build_manifest([spec], ManifestOptions(val_fraction=0.2))
    assert given.frame.filter(pl.col("split_official") == "test")["split_project"].unique().to_list() == ["test"]
    assert (given.frame["split_project"] == "val").sum() == 4
    project, _ = build_manifest([spec], ManifestOptions(split="project"))
    assert (project.frame["split_project"] == "test").sum() == 6
    moved = project.frame.filter((pl.col("split_official") == "test") & (pl.col("split_project") == "train"))
    assert moved.height
    assert not moved["ssl_ok"].any()


def test_a_patient_on_both_sides_of_a_given_split(make):
    spec = make("a", "path,patient_id,split\n1.png,x,train\n2.png,x,test\n3.png,y,val\n")
    with pytest.raises(LeakageError, match="1 patients are on both sides"):
        build_manifest([spec], ManifestOptions())


def test_provenance(make):
    spec = make("a", many(10))
    manifest, _ = build_manifest([spec], ManifestOptions(seed=5, policy=LabelPolicy(blank="zero")))
    metadata = manifest.metadata
    assert json.loads(metadata["roots"]) == {"a": str(spec.root)}
    assert json.loads(metadata["sources"]) == {"a": "folder"}
    digest = hashlib.sha256((spec.root / "labels.csv").read_bytes()).hexdigest()
    assert json.loads(metadata["source_sha256"]) == {"a": {"labels.csv": digest}}
    assert json.loads(metadata["counts"]) == {"a": {"images": 20, "patients": 10, "studies": 20}}
    assert metadata["seed"] == "5"
    assert metadata["label_policy"] == "uncertain=mask,blank=zero,tier=strict,imply_negatives=off,hierarchy=off"
    assert json.loads(metadata["split"])["rules"] == {"a": "project"}


def test_source_texts():
    spec = parse_source("folder:clinic=/data/a=b")
    assert (spec.source, spec.dataset, str(spec.root)) == ("folder", "clinic", "/data/a=b")
    assert parse_source("nih=/x").dataset == "nih"
    for text in ("nih", "nih=", "=x"):
        with pytest.raises(ConfigError):
            parse_source(text)
    with pytest.raises(UnknownNameError, match="Did you mean 'cxrlt'"):
        parse_source("cxr-lt=/x")
    with pytest.raises(ConfigError, match="--images"):
        parse_folders(["nih"], "--images")


def test_the_documented_source_works(tmp_path, monkeypatch):
    """The example of docs/how-to/add-a-dataset.md, run as it is printed."""
    page = (Path(__file__).parents[3] / "docs/how-to/add-a-dataset.md").read_text()
    namespace: dict = {}
    exec(page.split("```python\n")[1].split("```")[0], namespace)
    monkeypatch.setitem(SOURCES, "example", namespace["read"])
    (tmp_path / "images").mkdir()
    for name in ("1.png", "2.png", "3.png"):
        (tmp_path / "images" / name).touch()
    rows = "1.png,7,A,PA,effusion;big heart\n2.png,7,A,LL,effusion\n3.png,8,B,AP,normal\n"
    (tmp_path / "index.csv").write_text("file,patient,exam,projection,findings\n" + rows)
    manifest, notes = build_manifest([parse_source(f"example={tmp_path}")], ManifestOptions())
    assert manifest.findings == ("Cardiomegaly", "Normal", "Pleural Effusion")
    assert manifest.labels().tolist() == [[1, 0, 1], [0, 0, 1], [0, 1, 0]]
    assert manifest.frame["study_id"].to_list() == ["example/7/A", "example/7/A", "example/8/B"]
    assert notes == []


@pytest.mark.usefixtures("unchecked")
def test_options_are_checked(make):
    with pytest.raises(UnknownNameError, match="split"):
        ManifestOptions(split="offical")
    spec = make("a", many(3))
    with pytest.raises(ConfigError, match="named 'a'"):
        build_manifest([spec, spec], ManifestOptions())
    with pytest.raises(UnknownNameError, match="--images"):
        build_manifest([spec], ManifestOptions(images={"b": spec.root}))
    with pytest.raises(ConfigError, match="No source"):
        build_manifest([], ManifestOptions())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pool": "slides-710k-clean", "split": "project"}, "--split"),
        ({"pool": "slides-710k-clean", "val_fraction": 0.1}, "--val-fraction"),
        ({"pool": "slides-710k-clean", "test_fraction": 0.0}, "--test-fraction"),
        ({"accept_leak": True}, "--accept-leak"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(options, named):
    with pytest.raises(ConfigError, match=named):
        ManifestOptions(**options)


def test_a_folder_given_twice_is_refused():
    with pytest.raises(ConfigError, match=r"--images: nih is given twice \(/a and /b\)"):
        parse_folders(["nih=/a", "nih=/b"], "--images")
    with pytest.raises(ConfigError, match="--root: nih is given twice"):
        parse_roots(["nih=/a", "nih=/b"])


TAKE_A_TABLE = ("brax", "chexpert", "cxrlt2026", "folder", "mimic", "nih", "padchest", "siim", "taix")


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_a_table_is_refused_by_sources_that_would_not_read_it(source, tmp_path):
    (tmp_path / "other.csv").write_text("")
    spec = parse_source(f"{source}={tmp_path}")
    with pytest.raises(HilumError) as caught:
        build_manifest([spec], ManifestOptions(tables={source: tmp_path / "other.csv"}))
    assert ("--table" in str(caught.value) and isinstance(caught.value, ConfigError)) == (source not in TAKE_A_TABLE)


def test_frequency_groups_have_the_documented_edges():
    positives = {"a": 101, "b": 100, "c": 10, "d": 9, "e": 0}
    groups = frequency_groups(positives, 1000)
    assert groups == {"a": "head", "b": "medium", "c": "medium", "d": "tail", "e": "tail"}
    assert frequency_groups({"a": 0}, 0) == {"a": "tail"}


def test_orders_and_hashes():
    assert ordered(["Zebra", "Edema", "Alpha", "Atelectasis", "Edema"]) == ("Atelectasis", "Edema", "Alpha", "Zebra")
    assert findings_hash(["a", "b"]) != findings_hash(["b", "a"])
    assert findings_hash(["a b"]) != findings_hash(["a", "b"])
    assert len(FINDING_SETS["nih"]) == 15
