"""Exports say what the predictor says, through the whole of prediction, and nothing else is written."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.commands import export as program
from hilum.commands import predict
from hilum.core.errors import CheckpointError, ConfigError, HilumError, UnknownNameError
from hilum.core.seeding import forked
from hilum.data.store import Store
from hilum.deploy import model_files as files
from hilum.deploy import predictor
from hilum.deploy.engines import EXPORT_FORMAT, EXPORT_NAME, GraphNetwork, choose_precision, read_export
from hilum.deploy.exporting import comparing, directory
from hilum.deploy.exporting.comparing import Difference, difference, fixtures, refuse_if_different
from hilum.deploy.exporting.directory import export_model
from hilum.deploy.exporting.formats import Written
from hilum.deploy.exporting.graph import OUTPUTS, program_of
from hilum.deploy.network import Network, Reading
from hilum.evaluation.predictions import read_predictions
from hilum.heads.extension import ExtendedHead
from hilum.heads.registry import HeadConfig, build_head

pytest.importorskip("onnx", reason="the extra [export] is not installed")
pytest.importorskip("onnxscript", reason="the extra [export] is not installed")
pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
ENGINES = ["onnx", "openvino"]


@pytest.fixture(scope="module")
def exported(fitted: Path, tmp_path_factory) -> Path:
    """Folders `onnx` and `openvino`, of the ensemble: a linear head at 24 px, a decoder at 16 px with flip mean."""
    pytest.importorskip("openvino_telemetry", reason="the extra [openvino] is not installed")
    out = tmp_path_factory.mktemp("exported")
    for engine in ENGINES:
        program.run(fitted / "ensemble", engine, out / engine)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_whole_of_prediction_is_equal(
    fitted: Path, store: Store, exported: Path, tmp_path: Path, engine: str
) -> None:
    indices = store.indices("test")
    ours, theirs = predictor.load(fitted / "ensemble", "cpu"), predictor.load(exported / engine, "cpu", engine)
    assert all(isinstance(network, GraphNetwork) for network in theirs.networks)
    assert (theirs.digest, theirs.findings, theirs.composition) == (ours.digest, ours.findings, ours.composition)
    for unit in ("image", "study"):
        a, b = (model.predict_store(store, indices, unit=unit, batch_size=5) for model in (ours, theirs))
        np.testing.assert_allclose(b.probabilities, a.probabilities, atol=1e-5)
        assert b.stage == a.stage == "calibrated"
        assert {key: value for key, value in b.metadata.items() if key != "engine"} == a.metadata
    study = [store.read(int(index)) for index in indices[:3]]
    one, other = ours.predict(study), theirs.predict(study)
    for name in ours.findings:
        assert one.probabilities[name] == pytest.approx(other.probabilities[name], abs=1e-5)
        np.testing.assert_allclose(other.attention[name], one.attention[name], atol=1e-3)
    predict.run(exported / engine, [f"{store.path}:test"], tmp_path / "out.parquet", device="cpu", engine=engine)
    assert read_predictions(tmp_path / "out.parquet").metadata["engine"] == engine


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_reading_of_a_graph_is_the_networks(fitted: Path, exported: Path, engine: str) -> None:
    pairs = zip(
        predictor.load(fitted / "ensemble", "cpu").networks, predictor.load(exported / engine).networks, strict=True
    )
    for ours, theirs in pairs:
        squares = torch.from_numpy(fixtures(ours.config.resolution, 4))
        for maps in (True, False):
            a, b = ours.read(squares, attention=maps), theirs.read(squares, attention=maps)
            np.testing.assert_allclose(b.probabilities, a.probabilities, atol=1e-5)
            np.testing.assert_allclose(b.cls, a.cls, atol=1e-4)
            np.testing.assert_allclose(b.patch_mean, a.patch_mean, atol=1e-4)
            assert (a.attention is None) == (b.attention is None) == (not maps)
            if maps:
                np.testing.assert_allclose(b.attention, a.attention, atol=1e-3)  # evidence is nearly even here


@pytest.mark.slow
def test_findings_never_trained_are_null_in_every_engine_and_in_the_graph(fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted / "linear", tmp_path / "linear")
    config = json.loads((tmp_path / "linear" / "config.json").read_text())
    config["findings"][1]["trained"] = False
    (tmp_path / "linear" / "config.json").write_text(json.dumps(config))
    export_model(tmp_path / "linear", "onnx", tmp_path / "out")
    [network] = predictor.load(tmp_path / "out").networks
    squares = fixtures(network.config.resolution, 3)
    assert np.isnan(network.read(torch.from_numpy(squares)).probabilities).tolist() == [[False, True, False]] * 3
    assert np.isnan(network.session(squares, False)["probabilities"]).tolist() == [[False, True, False]] * 3


@pytest.mark.slow
def test_the_card_and_the_record_say_how_far_the_export_is_from_the_predictor(exported: Path) -> None:
    content = json.loads((exported / "onnx" / EXPORT_NAME).read_text())
    assert [one["folder"] for one in content["networks"]] == ["member_1", "member_2"]
    card = (exported / "onnx" / "README.md").read_text()
    assert card.startswith("# Ensemble of 2 models")
    for network in content["networks"]:
        apart = network["difference"]
        assert 0 < apart["probabilities"]["largest_difference"] <= apart["probabilities"]["tolerance"] == 1e-4
        assert f"{apart['probabilities']['largest_difference']:.2g}" in card
        assert network["versions"]["opset"] == 18
    assert not list((exported / "onnx").rglob("*.safetensors"))


def test_an_export_that_differs_is_not_written(fitted: Path, tmp_path: Path, monkeypatch) -> None:
    moved = [0.0]

    def stand_in(network, folder, notes):
        (folder / "model.graph").write_bytes(b"graph")

        def session(squares, maps):
            reading = network.read(torch.from_numpy(squares), attention=True)
            logits = np.log(reading.probabilities) - np.log1p(-reading.probabilities) + moved[0]
            return {**reading._asdict(), "logits": logits}

        return Written("model.graph", {}, lambda file: session)

    monkeypatch.setitem(directory.FORMATS, "onnx", stand_in)
    export_model(fitted / "linear", "onnx", tmp_path / "same")
    moved[0] = 0.01
    with pytest.raises(CheckpointError, match=r"differs from the predictor in probabilities by .* Nothing was written"):
        export_model(fitted / "linear", "onnx", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["same"]


def test_differences_are_found() -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((32, 3, 2, 2))
    maps /= maps.sum(axis=(2, 3), keepdims=True)
    tokens = rng.standard_normal((32, 8)).astype(np.float32)
    reading = Reading(rng.random((32, 3)), maps, tokens, tokens[::-1].copy())
    same = difference(reading, reading)
    assert (same.probabilities, same.maps) == (0, 0)
    assert same.cosine == pytest.approx(1)
    moved = maps.copy()
    moved[3, 1] = [[0, 0], [0, 1]]
    found = difference(reading, reading._replace(attention=moved))
    assert found.maps == pytest.approx(1 - maps[3, 1, 1, 1])
    off = reading.probabilities.copy()
    off[5, 2] += 0.01
    assert difference(reading, reading._replace(probabilities=off)).probabilities == pytest.approx(0.01)
    off[5, 2] = np.nan
    for broken in (
        reading._replace(probabilities=off), reading._replace(attention=None), reading._replace(cls=-tokens),
        reading._replace(patch_mean=tokens), reading._replace(cls=tokens * np.nan),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="differs"):
            refuse_if_different(difference(reading, broken), "MODEL")
    refuse_if_different(Difference(1e-4, 1e-2, 0.9999), "MODEL")


def test_fixtures_are_the_same_every_time_and_differ_from_each_other() -> None:
    pictures = fixtures(32)
    np.testing.assert_array_equal(pictures, fixtures(32))
    assert pictures.shape == (comparing.FIXTURES, 1, 32, 32)
    assert sum(comparing.BATCHES) == comparing.FIXTURES
    assert len({picture.tobytes() for picture in pictures}) == comparing.FIXTURES
    assert (int(pictures[0].max()), int(pictures[1].min())) == (0, 255)


def test_a_head_that_reads_whole_studies_is_refused_in_one_sentence(fitted: Path, tmp_path: Path, monkeypatch) -> None:
    model = predictor.load(fitted / "linear", "cpu")
    model.networks[0].head.needs_studies = True
    monkeypatch.setattr(directory, "load", lambda *_: model)
    with pytest.raises(ConfigError, match="reads all images of a study together"):
        export_model(fitted / "linear", "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda path: (path / "member_1" / "model.onnx").write_bytes(b"x"), "missing or has changed"),
        (lambda path: (path / "member_2" / "model.onnx").unlink(), "missing or has changed"),
        (lambda path: (path / "member_1" / "config.json").write_text("{}"), "has changed since the export"),
        (lambda path: (path / EXPORT_NAME).write_text("[]"), "expected format 'hilum-export-1'"),
        (lambda path: (path / EXPORT_NAME).write_text('{"format": "hilum-export-2"}'), "expected format"),
    ],
)
def test_damage_is_named(exported: Path, tmp_path: Path, change, match: str) -> None:
    shutil.copytree(exported / "onnx", tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(CheckpointError, match=match):
        predictor.load(tmp_path / "copy")


@pytest.mark.parametrize("name", ["../elsewhere", "a/../../b", "/etc/passwd"])
@pytest.mark.parametrize("place", ["folder", "graph", "files"])
def test_an_export_names_no_file_outside_of_it(tmp_path: Path, place: str, name: str) -> None:
    network = {"folder": ".", "graph": "model.onnx", "model": "0" * 16, "files": {"model.onnx": "0" * 64}}
    network[place] = {name: "0" * 64} if place == "files" else name
    described = {"format": EXPORT_FORMAT, "export": "onnx", "networks": [network]}
    (tmp_path / EXPORT_NAME).write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=f"names '{name}', outside of the export"):
        read_export(tmp_path)


@pytest.mark.slow
def test_mistakes_are_answered(fitted: Path, exported: Path, tmp_path: Path) -> None:
    mistakes = [
        (lambda: export_model(fitted / "linear", "tflite", tmp_path / "a"), UnknownNameError, "Unknown format"),
        (lambda: export_model(fitted / "linear", "onnx", exported), ConfigError, "is there already"),
        (lambda: export_model(exported / "onnx", "onnx", tmp_path / "a"), ConfigError, "is an export already"),
        (lambda: predictor.load(fitted / "linear", "cpu", "onnx"), ConfigError, "hilum export .* --format onnx"),
        (lambda: predictor.load(fitted / "linear", "cpu", "tensorrt"), UnknownNameError, "Unknown engine"),
        (lambda: predictor.load(exported / "onnx", "cpu", "openvino"), ConfigError, "for --engine onnx"),
        (lambda: predictor.load(exported / "onnx", "cpu", None, "bf16"), ConfigError, "ONNX Runtime computes in fp32"),
        (lambda: predictor.load(fitted / "linear", "cpu", None, "fp8"), UnknownNameError, "Unknown precision"),
    ]
    for attempt, kind, match in mistakes:
        with pytest.raises(HilumError, match=match) as caught:
            attempt()
        assert isinstance(caught.value, kind)


@pytest.mark.slow
def test_a_torch_program_runs_alone_and_is_not_read_by_hilum(fitted: Path, tmp_path: Path) -> None:
    export_model(fitted / "decoder", "torch-export", tmp_path / "out")
    [network] = predictor.load(fitted / "decoder", "cpu").networks
    network.config = dataclasses.replace(network.config, flip_average=False)
    squares = torch.from_numpy(fixtures(network.config.resolution, 5))
    found = torch.export.load(tmp_path / "out" / "model.pt2").module()(squares)
    np.testing.assert_allclose(found[0].detach().numpy(), network.read(squares).probabilities, atol=1e-6)
    with pytest.raises(ConfigError, match="an export for other programs"):
        predictor.load(tmp_path / "out")


def test_precision_is_fp32_unless_it_is_asked_for(fitted: Path, store: Store, monkeypatch) -> None:
    [plain] = predictor.load(fitted / "decoder", "cpu").networks
    assert plain.config.precision == "fp32"
    model = predictor.load(fitted / "decoder", "cpu", precision="bf16")
    squares = torch.from_numpy(fixtures(plain.config.resolution, 8))
    fp32, bf16 = plain.read(squares), model.networks[0].read(squares)
    assert 0 < np.abs(fp32.probabilities - bf16.probabilities).max() < 0.01
    assert model.predict_store(store, store.indices("test")[:2]).metadata["precision"] == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert [choose_precision(asked, "fp32") for asked in (None, "fp32", "bf16", "auto")] == [
        "fp32",
        "fp32",
        "bf16",
        "fp32",
    ]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert [choose_precision(asked, "bf16") for asked in (None, "fp32", "auto")] == ["bf16", "fp32", "bf16"]
    assert choose_precision("auto", "fp32") == "bf16"


HEADS = {
    "linear with mean patch": {"name": "linear", "patch_mean": True},
    "csra": {"name": "csra", "csra_temperatures": (1.0, 4.0)},
    "decoder": {"name": "ml_decoder"},
    "decoder with everything": {
        "name": "ml_decoder", "decoder_layers": 2, "cls_memory": True, "positions": "sincos",
        "attention_temperature": True, "pyramid": True, "cat_cls": True,
    },
    "decoder with groups": {"name": "ml_decoder", "query_groups": 2},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_every_kind_of_head_becomes_a_graph_for_any_number_of_images(head: str, extended: bool) -> None:
    sizes = {"decoder_dim": 8, "decoder_feed_forward": 12, "decoder_heads": 2}
    config = HeadConfig(embed_dim=12, findings=3, blocks=2, **HEADS[head], **sizes)
    architecture = ViTConfig(12, 2, 2, patch_size=4, image_size=32, layer_scale=0.5, registers=2)
    with forked(0, "test"):
        backbone, built = VisionTransformer(architecture), build_head(config)
        if extended:
            other = build_head(HeadConfig("linear", 12, 1, 2))
            built = ExtendedHead(built, [other], [3, 1])
    names = ("Edema", "Hernia", "Mass", "Scoliosis")[: 3 + extended]
    findings = tuple(files.Finding(name, "head", True, 5, 10) for name in names)
    network = Network(files.NetworkConfig(architecture, config, findings, "hilum-grey-1", 32, None), backbone, built)
    run = program_of(network).module()

    def read(pictures: np.ndarray) -> Reading:
        with torch.no_grad():
            found = dict(zip(OUTPUTS, run(torch.from_numpy(pictures)), strict=True))
        assert torch.equal(found["probabilities"], torch.sigmoid(found["logits"]))
        values = torch.sigmoid(found["logits"].double()).numpy()
        return Reading(values, found["attention"].double().numpy(), found["cls"].numpy(), found["patch_mean"].numpy())

    pictures = fixtures(32)
    expected = comparing.read_in_batches(lambda part: network.read(torch.from_numpy(part), attention=True), pictures)
    assert expected.attention is not None
    assert np.ptp(expected.probabilities[:, 0]) > 1e-4
    refuse_if_different(difference(expected, comparing.read_in_batches(read, pictures)), head)
