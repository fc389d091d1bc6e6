"""What is answered when all is well: the document, pictures, and that they go again."""

import io
import json
import math

import jsonschema
import numpy as np
import pytest
from damage_inputs import phantom, radiograph, written
from PIL import Image

from hilum.data.images import read_image
from hilum.deploy.study_report import study_schema


def finite(value) -> bool:
    if isinstance(value, dict):
        return all(finite(one) for one in value.values())
    if isinstance(value, list):
        return all(finite(one) for one in value)
    return not isinstance(value, float) or math.isfinite(value)


def test_a_study_is_answered_as_the_predictor_says(server, model, films) -> None:
    contents = films
    answer = server.upload(contents, ["PA", ""])
    assert answer.status == 200, answer.body
    document = answer.json
    jsonschema.Draft202012Validator(study_schema()).validate(document)
    assert finite(document)
    names = [*document["study"]["images"]]
    assert [image["view"] for image in names] == ["PA", "LATERAL"]
    expected = model.predict(contents, view_names=["PA", "LATERAL"])
    found = {one["name"]: one["probability"] for one in document["findings"]}
    assert found == expected.probabilities  # the same pixels, so the same bits
    assert found["Never"] is None


@pytest.fixture(scope="module")
def films() -> list[bytes]:
    values = phantom(90, 80, 3).astype(np.uint16) * 16 + 9
    lateral = radiograph(values, ViewPosition="LATERAL", BitsStored=12, HighBit=11, WindowCenter=2000, WindowWidth=3000)
    buffer = io.BytesIO()
    Image.fromarray(phantom(70, 64, 4)).save(buffer, "JPEG")
    return [buffer.getvalue(), written(lateral)]


def test_pictures_are_the_whole_image(server, films) -> None:
    study = server.upload(films).json["study"]["id"]
    for number, content in enumerate(films, 1):
        answer = server.ask("GET", f"/api/studies/{study}/images/{number}.png")
        assert answer.headers["content-type"] == "image/png"
        shown = np.asarray(Image.open(io.BytesIO(answer.body)))
        assert np.array_equal(shown, read_image(content).pixels)
    for wrong in ("0", "3", "-1", "99999999999999999999"):
        assert server.ask("GET", f"/api/studies/{study}/images/{wrong}.png").status == 404
    assert server.ask("GET", f"/api/studies/{study}/images/one.png").status == 422


def test_a_large_image_is_shown_at_1024_pixels(server) -> None:
    buffer = io.BytesIO()
    Image.fromarray(phantom(96, 80).repeat(15, 0).repeat(15, 1)).save(buffer, "JPEG", quality=20)
    study = server.upload([buffer.getvalue()]).json
    assert (study["study"]["images"][0]["rows"], study["study"]["images"][0]["columns"]) == (1440, 1200)
    shown = Image.open(io.BytesIO(server.ask("GET", f"/api/studies/{study['study']['id']}/images/1.png").body))
    assert max(shown.size) == 1024


def test_a_study_can_be_asked_for_again_and_forgotten(server, films) -> None:
    first = server.upload(films)
    name = first.json["study"]["id"]
    assert server.ask("GET", f"/api/studies/{name}").body == first.body
    assert server.ask("DELETE", f"/api/studies/{name}").status == 204
    for method, path in (("GET", ""), ("GET", "/images/1.png"), ("GET", "/maps/0/1.png"), ("DELETE", "")):
        answer = server.ask(method, f"/api/studies/{name}{path}")
        assert (answer.status, answer.code) == (404, "not_found")


def test_the_same_upload_is_not_computed_again_and_has_a_name_of_its_own(server, films, monkeypatch) -> None:
    """Two pages with the same images: one is closed, and the other goes on."""
    one = server.upload(films, ["PA", ""]).json
    computed = []
    predict = server.service.model.predict
    monkeypatch.setattr(server.service.model, "predict", lambda *a, **k: computed.append(1) or predict(*a, **k))
    two = server.upload(films, ["PA", ""]).json
    assert not computed
    names = [study["study"].pop("id") for study in (one, two)]
    assert names[0] != names[1]
    assert one == two
    assert server.ask("DELETE", f"/api/studies/{names[0]}").status == 204
    assert server.ask("GET", f"/api/studies/{names[1]}/maps/0/1.png").status == 200
    assert server.ask("GET", f"/api/studies/{names[1]}").json["study"]["id"] == names[1]
    server.upload(films, ["PA", ""])
    assert not computed
    server.upload(films, ["AP", ""])
    server.upload(films[::-1], ["PA", ""])
    assert len(computed) == 2


def test_only_a_few_studies_are_remembered(server, make_film) -> None:
    names = [server.upload([make_film(seed)]).json["study"]["id"] for seed in range(100, 106)]
    assert [server.ask("GET", f"/api/studies/{name}").status for name in names] == [404, 404, 200, 200, 200, 200]


def test_files_of_different_patients_are_flagged(server) -> None:
    films = [written(radiograph(phantom(seed=n), PatientID=f"MRN-{n}")) for n in (1, 2)]
    document = server.upload(films).json
    assert "several_studies" in {flag["code"] for flag in document["flags"]}
    assert "MRN" not in json.dumps(document)
    same = [written(radiograph(phantom(seed=n), PatientID="MRN-1")) for n in (1, 2)]
    assert "several_studies" not in {flag["code"] for flag in server.upload(same).json["flags"]}


def test_metadata_names_what_the_page_needs(server, model) -> None:
    found = server.ask("GET", "/metadata").json
    assert [one["name"] for one in found["findings"]] == list(model.findings)
    assert [one["trained"] for one in found["findings"]] == [True, True, True, False]
    assert found["limits"] == {"files": 4, "file_bytes": 2**20, "study_bytes": 2**21, "pixels": 64 * 2**20}
    assert (found["similar"], found["maps"], found["model"]["digest"]) == (False, True, model.digest)
    assert found["screened"] == (model.screening is not None)
    assert "not a medical device" in found["notice"]
    assert set(found["thresholds"]) >= {"f1", "youden", "sens_at_spec95"}
