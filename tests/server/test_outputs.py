"""Maps, reports and similar cases over HTTP: the parts that others make, wired to their addresses."""

import copy
import io
import json
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import strangers
from damage_inputs import phantom, radiograph, written
from PIL import Image
from pydicom import config

from hilum.commands import index as index_program
from hilum.deploy.gradients import gradient_map
from hilum.deploy.screening import fit_screening
from hilum.deploy.server.gate import CONTENT_POLICY
from hilum.deploy.similar import Index


@pytest.fixture(scope="module")
def study(server, make_film) -> str:
    return server.upload([make_film(1), make_film(2)], ["PA", "LATERAL"]).json["study"]["id"]


def test_a_map_lies_over_the_image(server, study, model) -> None:
    picture = Image.open(io.BytesIO(server.ask("GET", f"/api/studies/{study}/images/1.png").body))
    answer = server.ask("GET", f"/api/studies/{study}/maps/0/1.png")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
    heat = Image.open(io.BytesIO(answer.body))
    assert (heat.mode, heat.size) == ("RGBA", picture.size)
    assert np.asarray(heat)[..., 3].any()
    other = server.ask("GET", f"/api/studies/{study}/maps/1/1.png").body
    assert other != answer.body
    never = model.findings.index("Never")
    assert server.ask("GET", f"/api/studies/{study}/maps/{never}/1.png").code == "no_map"
    for path in ("0/3", "4/1", "-1/1", "0/0", "99/1"):
        assert server.ask("GET", f"/api/studies/{study}/maps/{path}.png").status == 404
    assert server.ask("GET", f"/api/studies/{study}/maps/x/1.png").status == 422


@pytest.mark.parametrize(
    ("name", "kind"),
    [("report.json", "application/json"), ("report.fhir.json", "application/fhir+json"), ("report.html", "text/html")],
)
def test_reports_are_files_to_keep(server, study, name: str, kind: str) -> None:
    answer = server.ask("GET", f"/api/studies/{study}/{name}")
    assert answer.status == 200
    assert answer.headers["content-type"].partition(";")[0] == kind
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "sandbox" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"


def test_reports_say_what_the_study_says(server, study) -> None:
    document = server.ask("GET", f"/api/studies/{study}").json
    assert server.ask("GET", f"/api/studies/{study}/report.json").json == document
    bundle = server.ask("GET", f"/api/studies/{study}/report.fhir.json").json
    assert bundle["resourceType"] == "Bundle"
    page = server.ask("GET", f"/api/studies/{study}/report.html").body.decode()
    assert all(one["name"] in page for one in document["findings"])
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)


@pytest.fixture(scope="module")
def with_index(make_server, model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "index"
    index_program.run(str(model_folder / "model"), str(model_folder / "store"), path, findings=["Edema"], device="cpu")
    return make_server(index=Index.open(path))


def test_similar_cases_have_pictures(with_index, make_film) -> None:
    server = with_index
    study = server.upload([make_film(1)]).json["study"]["id"]
    cases = server.ask("GET", f"/api/studies/{study}/similar?count=5").json["cases"]
    assert [case["rank"] for case in cases] == [1, 2, 3, 4, 5]
    similarities = [case["similarity"] for case in cases]
    assert similarities == sorted(similarities, reverse=True)
    assert all(-1 <= one <= 1 for one in similarities)
    picture = server.ask("GET", cases[0]["thumbnail"])
    assert picture.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(picture.body)).mode == "L"
    by_finding = server.ask("GET", f"/api/studies/{study}/similar?count=3&finding=Edema").json["cases"]
    assert len(by_finding) == 3
    assert server.ask("GET", "/metadata").json["similar"] is True


@pytest.mark.parametrize("by", ["", "&finding=Edema"])
def test_the_patient_of_a_dicom_file_is_not_among_the_similar_cases(with_index, by: str, caplog, capfd) -> None:
    """By the patient's id and by that of the study, in headers; the ids are kept nowhere, and other files go on."""
    server, index = with_index, with_index.service.cases.index
    row = len(index) - 1
    patient, study = index._named("patient", row), index.case(row).study_id

    def cases_of(**ids: str | None) -> list[str]:
        with config.disable_value_validation():  # the studies of this index are no UIDs
            film = written(radiograph(phantom(seed=2), **ids))
        name = server.upload([film]).json["study"]["id"]
        cases = server.ask("GET", f"/api/studies/{name}/similar?count=50{by}").json["cases"]
        return [one["study_id"] for one in cases]

    with caplog.at_level("INFO"):
        everything = cases_of(PatientID="Somebody-Else", StudyInstanceUID="1.2.3.999")
    said = capfd.readouterr()
    kept = repr(list(server.service.results._kept.values()))
    assert "Somebody-Else" not in kept + caplog.text + said.out + said.err
    assert "/similar" in caplog.text
    assert len(everything) == len(index)
    of_patient = {index.case(n).study_id for n in range(len(index)) if index._named("patient", n) == patient}
    assert study in of_patient
    assert set(cases_of(PatientID=patient, StudyInstanceUID="1.2.3.999")) == set(everything) - of_patient
    assert set(cases_of(PatientID=None, StudyInstanceUID=study)) == set(everything) - {study}
    assert len(cases_of(PatientID="x" * 5000, StudyInstanceUID=None)) == len(index)


@pytest.mark.parametrize(
    ("query", "status"),
    [("count=0", 422), ("count=51", 422), ("count=-1", 422), ("count=many", 422), ("finding=Hernia", 404),
     ("finding=%00", 404), ("finding=" + "a" * 5000, 404), ("count=1e9", 422), ("finding=", 404)],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(with_index, make_film, query: str, status: int) -> None:
    study = with_index.upload([make_film(1)]).json["study"]["id"]
    assert with_index.ask("GET", f"/api/studies/{study}/similar?{query}").status == status


@pytest.mark.parametrize(("row", "status"), [("9999999", 404), ("-1", 422), ("x", 422), ("9" * 40, 404)])
def test_cases_that_are_not_there(with_index, row: str, status: int) -> None:
    assert with_index.ask("GET", f"/api/cases/{row}.png").status == status


def test_without_an_index_there_is_nothing_similar(server, study) -> None:
    answer = server.ask("GET", f"/api/studies/{study}/similar")
    assert (answer.status, answer.code) == (404, "no_index")
    assert server.ask("GET", "/api/cases/0.png").status == 404


def test_cases_of_restricted_data_are_not_shown_to_others(with_index, make_server, model, model_folder) -> None:
    """The licence table decides, and a store that does not tell decides for no."""
    from hilum.deploy.server.cases import Cases, _hidden_datasets

    index = with_index.service.cases.index
    manifest = model_folder / "store" / "manifest.parquet"
    before = manifest.read_bytes() if manifest.exists() else None
    table = pl.DataFrame({"dataset": ["arrays"], "licence_tag": ["nih-open"]})
    try:
        for tag, hidden in (("nih-open", set()), ("physionet-credentialed", {"arrays"}), ("", {"arrays"})):
            table.with_columns(pl.lit(tag).alias("licence_tag")).write_parquet(manifest)
            assert _hidden_datasets(index) == hidden
        table.with_columns(pl.lit("physionet-credentialed").alias("licence_tag")).write_parquet(manifest)
        shared, own = Cases(index, model, True), Cases(index, model, False)
    finally:
        manifest.unlink()
        if before is not None:
            manifest.write_bytes(before)
    assert _hidden_datasets(index) == {""} or before is not None
    dataset = index.case(0).dataset
    shared.hidden = own.hidden | {dataset}
    withheld, shown = (cases._case(1, index.case(0)) for cases in (shared, own))
    assert [withheld[name] for name in ("study_id", "findings", "thumbnail")] == [None, None, None]
    assert (withheld["similarity"], withheld["dataset"]) == (shown["similarity"], dataset)
    assert shown["thumbnail"] == "/api/cases/0.png"
    assert (shown["study_id"], shown["findings"]) == (index.case(0).study_id, index.case(0).positive)
    with pytest.raises(Exception, match="no_picture"):
        shared.thumbnail(0)
    assert own.thumbnail(0).startswith(b"\x89PNG")


def test_text_that_may_be_burnt_in_is_pointed_at(server) -> None:
    expected = {"YES": "burned_in_annotation", "NO": None, None: "burned_in_unknown", "": "burned_in_unknown",
                "MAYBE": "burned_in_unknown"}  # fmt: skip
    for value, code in expected.items():
        film = written(radiograph(phantom(seed=2), BurnedInAnnotation=value, Modality="DX"))
        [image] = server.upload([film]).json["study"]["images"]
        codes = {flag["code"] for flag in image["flags"]} & {"burned_in_annotation", "burned_in_unknown"}
        assert codes == ({code} if code else set())


@pytest.mark.parametrize("modality", ["CT", "MR", "US", "NM", "PT", "MG", "XA"])
def test_other_kinds_of_pictures_are_refused_by_their_header(server, modality: str) -> None:
    answer = server.upload([written(radiograph(phantom())), written(radiograph(phantom(), Modality=modality))])
    assert (answer.status, answer.code, answer.json["error"]["image"]) == (422, "not_a_radiograph", 2)


def test_markup_in_names_stays_text(make_server, model, make_film) -> None:
    """A finding can be called anything; reports and JSON say it as text."""
    name = "<script>alert(1)</script>\"'&"
    other = copy.copy(model)
    predict = model.predict

    def renamed(*arguments, **options):
        result = predict(*arguments, **options)

        def keys(values):
            return {name if key == "Mass" else key: value for key, value in values.items()}

        return replace(
            result, findings=tuple(name if one == "Mass" else one for one in result.findings),
            probabilities=keys(result.probabilities), contributions=keys(result.contributions),
            attention=keys(result.attention), thresholds=keys(result.thresholds),
            image_probabilities=[keys(one) for one in result.image_probabilities],
        )  # fmt: skip

    other.predict = renamed
    server = make_server(of=other)
    server.service._check_numbers = lambda result: None
    study = server.upload([make_film(3)]).json["study"]["id"]
    answer = server.ask("GET", f"/api/studies/{study}/report.html")
    assert b"<script>alert" not in answer.body
    assert b"&lt;script&gt;" in answer.body
    assert server.ask("GET", f"/api/studies/{study}").headers["content-type"] == "application/json"


def test_policies_allow_nothing_from_elsewhere() -> None:
    assert "http" not in CONTENT_POLICY
    assert json.dumps(CONTENT_POLICY).count("'self'") == 2


def test_a_picture_of_another_kind_is_withheld(make_server, model) -> None:
    """With real screening, fitted on drawn films: ten kinds of pictures that are none, and two films that lie wrong."""
    rng = np.random.default_rng(0)
    maps = np.stack([gradient_map(strangers.film(rng, lateral)) for lateral in (False, True) for _ in range(100)])
    views = ["PA"] * 100 + ["LATERAL"] * 100
    other = copy.copy(model)
    other.screening = fit_screening(maps, views, [str(n) for n in range(200)], maps[:20], views[:20])
    server = make_server(of=other)
    film = strangers.film(np.random.default_rng(2))
    kinds = {name: make(np.random.default_rng(1), film) for name, make in strangers.DRAWN.items()}
    assert len(kinds) >= 10
    turned = {"inverted": 255 - film, "turned": np.ascontiguousarray(film[::-1])}
    for name, picture in {**kinds, **turned}.items():
        document = server.upload([png_of(picture)]).json
        assert document["status"] == "withheld", name
        assert {one["probability"] for one in document["findings"]} == {None}
        assert document["study"]["images"][0]["scored"] is False
        code = document["study"]["images"][0]["flags"][0]["code"]
        assert code in ("not_a_chest_xray", "inverted", "turned"), name
        study = document["study"]["id"]
        assert server.ask("GET", f"/api/studies/{study}/maps/0/1.png").code == "no_map"
        assert server.ask("GET", f"/api/studies/{study}/report.html").status == 200
    document = server.upload([png_of(film), png_of(kinds[next(iter(kinds))])]).json
    assert document["status"] == "scored"
    assert [image["scored"] for image in document["study"]["images"]] == [True, False]
    assert document["study"]["images"][0]["view_source"] == "classifier"


def png_of(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
