"""The page in a real browser before a stand-in server: everything that a reader does.

Past 300 lines: one act of the reader after the other, which share what they look at.
"""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from reading import Reader, image_file, new_reader
from stand_in import FINDINGS, NEVER_TRAINED, NOT_SCREENED, StandIn, error_body, serving

pytestmark = pytest.mark.slow  # a minute together

HOSTILE = (
    "<script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    '"><svg onload=window.hit=1>',
    "javascript:window.hit=1",
    "'; window.hit=1; //",
    "</textarea><iframe srcdoc='<script>parent.hit=1</script>'>",
    "${window.hit=1}{{constructor.constructor('window.hit=1')()}}",
    "<a href=javascript:window.hit=1>x</a>",
    "\u202egnp.x\u0000",
)


def test_the_heat_is_of_the_chosen_finding_by_its_place_in_the_metadata(reader: Reader):
    reader.read()
    reader.page.select_option("#sort", "name")
    reader.choose("Pleural Effusion")
    maps = [path for _, path in reader.server.asked if "/maps/" in path]
    assert [path.split("/maps/")[1] for path in sorted(maps)] == [
        f"{FINDINGS.index('Pleural Effusion')}/{number}.png" for number in (1, 2)
    ]


def test_the_overlay_has_a_slider_and_goes_away_with_the_choice(reader: Reader):
    reader.read().choose("Edema").settle()
    strong = reader.colours()
    reader.page.locator("#opacity").fill("20")
    reader.settle()
    assert 0 < reader.colours() < strong
    reader.page.keyboard.press("o")
    reader.settle()
    assert reader.colours() == 0
    reader.page.keyboard.press("o")
    reader.page.keyboard.press("Escape")
    reader.settle()
    assert reader.colours() == 0
    assert reader.page.locator("[aria-selected=true]").count() == 0


def test_keys_go_through_the_findings(reader: Reader):
    reader.read()
    order = reader.names()
    chosen = reader.page.locator("[aria-selected=true]")
    for key, place in (("j", 0), ("j", 1), ("ArrowDown", 2), ("k", 1), ("ArrowUp", 0), ("End", 39), ("Home", 0)):
        reader.page.keyboard.press(key)
        assert chosen.get_attribute("data-finding") == order[place], key
        assert reader.page.locator("#list").get_attribute("aria-activedescendant") == chosen.get_attribute("id")
    reader.page.keyboard.press("Escape")
    assert chosen.count() == 0
    reader.page.keyboard.press("Enter")
    assert chosen.get_attribute("data-finding") == order[0]
    reader.page.keyboard.press("?")
    assert reader.page.locator("#help").is_visible()
    reader.page.keyboard.press("Escape")
    assert not reader.page.locator("#help").is_visible()
    assert chosen.count() == 1
    reader.page.keyboard.press("/")
    reader.page.keyboard.type("plEural")
    assert sorted(reader.names()) == ["Pleural Effusion", "Pleural Other", "Pleural Thickening"]
    reader.page.keyboard.press("Enter")
    assert chosen.get_attribute("data-finding") == "Pleural Effusion"
    reader.page.keyboard.press("1")
    assert reader.page.locator("figure.view:visible").count() == 1
    reader.page.keyboard.press("1")
    assert reader.page.locator("figure.view:visible").count() == 2


def test_window_zoom_and_inversion_are_of_the_canvas_and_reset_gives_the_same_pixels(reader: Reader):
    reader.read().settle()
    page, plain = reader.page, np.array(reader.greys())
    inside = plain > 0
    page.keyboard.press("i")
    reader.settle()
    inverted = np.array(reader.greys())
    assert np.abs(inverted[inside] + plain[inside] - 255).max() <= 2  # smoothing rounds each way
    page.keyboard.press("r")
    reader.settle()
    assert (np.array(reader.greys()) == plain).all()
    other = reader.greys(2)
    box = page.locator("#image-1").bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] - 120, middle[1], steps=3)
    page.mouse.up()
    reader.settle()
    narrow = np.array(reader.greys())
    assert narrow[inside].std() > 1.3 * plain[inside].std()
    assert "W 147" in page.locator("figure.view").first.inner_text()
    assert reader.greys(2) == other
    page.keyboard.press("r")
    page.mouse.wheel(0, -600)
    reader.settle()
    assert "246 %" in page.locator("figure.view").first.inner_text()
    assert page.locator(".corner.zoom").nth(1).inner_text() == ""
    page.locator("#image-1").focus()
    page.keyboard.press("r")
    reader.settle()
    assert (np.array(reader.greys()) == plain).all()
    page.keyboard.press("p")
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1], steps=3)
    page.mouse.up()
    reader.settle()
    assert "W 255" in page.locator("figure.view").first.inner_text()
    assert not (np.array(reader.greys()) == plain).all()


def test_rows_are_sorted_grouped_and_say_what_they_show(reader: Reader):
    reader.read()
    page = reader.page
    groups = [text.split("\n")[0] for text in page.locator(".group b").all_inner_texts()]
    assert groups == ["Head", "Medium", "Tail"]
    page.select_option("#grouping", "flat")
    document = next(iter(reader.server.studies.values()))[0]
    known = {one["name"]: one for one in document["findings"]}
    trained = [name for name in FINDINGS if name not in NEVER_TRAINED]
    by_probability = sorted(trained, key=lambda name: -known[name]["probability"])
    assert reader.names()[:38] == by_probability
    page.select_option("#sort", "name")
    assert reader.names()[:38] == sorted(trained, key=str.casefold)
    page.select_option("#sort", "above")
    for rule in ("f1", "youden", "sens_at_spec95"):
        page.select_option("#threshold", rule)
        above = sum(known[name]["above"][rule] for name in trained)
        assert page.locator(".row.above").count() == above
        assert all(known[name]["above"][rule] for name in reader.names()[:above])
        assert f"{above} of 38 above" in page.locator("#counted").inner_text()
    row = reader.row("Cardiomegaly")
    assert row.get_attribute("aria-label").startswith("Cardiomegaly: 62 %, interval 42 % to 78 %, above the")
    track, bar, tick = (row.locator(one).bounding_box() for one in (".track", ".bar", ".tick"))
    assert bar["width"] / track["width"] == pytest.approx(0.62, abs=0.01)
    assert (tick["x"] + 1 - track["x"]) / track["width"] == pytest.approx(0.448, abs=0.01)
    whisker = row.locator(".whisker").bounding_box()
    assert whisker["width"] / track["width"] == pytest.approx(known["Cardiomegaly"]["interval"][1] - 0.424, abs=0.01)
    for grouping in ("flat", "groups"):  # what is written on the axis stands where bars of that length end
        page.select_option("#grouping", grouping)
        half = page.locator("#axis span").nth(1).bounding_box()
        track = reader.row("Edema").locator(".track").bounding_box()
        assert half["x"] + half["width"] / 2 == pytest.approx(track["x"] + track["width"] / 2, abs=1)
    page.select_option("#grouping", "flat")
    assert all(reader.row(name).get_attribute("aria-label") == f"{name}: never trained" for name in NEVER_TRAINED)
    assert reader.names()[38:] == sorted(NEVER_TRAINED)
    never, other = reader.row(NEVER_TRAINED[0]), reader.row("Edema")
    assert never.inner_text().split("\n") == [NEVER_TRAINED[0], "never trained"]
    for part in (".name", ".value"):  # in the same columns as the others
        edges = [one.locator(part).bounding_box() for one in (never, other)]
        side = "x" if part == ".name" else "right"
        places = [{**box, "right": box["x"] + box["width"]}[side] for box in edges]
        assert places[0] == pytest.approx(places[1], abs=0.5)
    assert reader.row("Tuberculosis").locator(".reserve").count() == 1


def test_similar_cases_by_the_study_or_by_the_finding(reader: Reader):
    reader.read()
    page = reader.page
    page.wait_for_selector(".case")
    assert page.locator("input[name=by][value=finding]").is_disabled()
    reader.choose("Edema")
    with page.expect_request(re.compile(r"/similar\?count=8&finding=Edema$")):
        page.locator("input[name=by][value=finding]").check()
    page.wait_for_selector(".label.same")
    with page.expect_request(re.compile(r"/similar\?count=8&finding=Pneumonia$")):
        reader.row("Pneumonia").click()
    page.locator(".case").nth(1).click()
    assert page.locator("#case").is_visible()
    assert "Similar case 2" in page.locator("#case").inner_text()


def test_downloads_are_the_documents_of_the_server(reader: Reader):
    reader.read()
    for name, mark in (
        ("report.json", "hilum-study-1"),
        ("report.fhir.json", "DiagnosticReport"),
        ("report.html", "<title>"),
    ):
        with reader.page.expect_download() as waiting:
            reader.page.locator(f"[data-save='{name}']").click()
        assert waiting.value.suggested_filename.endswith(name)
        assert mark in Path(waiting.value.path()).read_text()


def test_themes_and_choices_are_remembered_and_nothing_of_a_study_is(reader: Reader):
    page = reader.page
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == "dark"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    reader.read(image_file(1, "Jane Doe.png"), image_file(2))
    page.keyboard.press("t")
    page.select_option("#sort", "name")
    assert page.evaluate(theme) == "light"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", light))) > 3 * sum(map(int, re.findall(r"\d+", dark)))
    kept = page.evaluate("JSON.stringify([{ ...localStorage }, { ...sessionStorage }, document.cookie])")
    assert json.loads(kept) == [{"hilum-theme": "light", "hilum-sort": "name"}, {}, ""]
    reader.open()
    assert page.evaluate(theme) == "light"
    assert page.locator("#sort").input_value() == "name"


def test_no_name_of_a_file_leaves_the_page(reader: Reader):
    reader.read(image_file(1, "Doe^Jane 1950-01-01.png"), image_file(2, "b.png"))
    assert reader.server.uploads == [{"names": ["image-1", "image-2"], "views": []}]


def test_text_of_files_and_labels_stays_text(context, server: StandIn, address: str):
    server.rename = dict(zip(FINDINGS, HOSTILE, strict=False)) | {"Mass": "x" * 4000}
    server.labels = list(HOSTILE)
    server.failures.append((422, error_body("unreadable", HOSTILE[0], 1), {}))
    reader = new_reader(context, server, address).open()
    reader.give(
        *(image_file(n, f"{name.replace(chr(0), '').replace('/', '')}.png") for n, name in enumerate(HOSTILE[:4]))
    )
    reader.page.wait_for_selector("#alert:not([hidden])")
    assert HOSTILE[0] in reader.page.locator("#alert").inner_text()
    assert reader.page.locator(".note .file").first.inner_text() == HOSTILE[0].replace("/", "") + ".png"
    reader.read()
    reader.page.wait_for_selector(".case")
    for name in HOSTILE[:8]:
        reader.page.locator("[role=option]").nth(reader.names().index(name)).click()
        reader.settle()
    reader.page.locator(".case").first.click()
    reader.page.wait_for_timeout(200)
    assert reader.page.evaluate("window.hit") is None
    found = reader.page.evaluate("[...document.querySelectorAll('script')].map(one => one.getAttribute('src'))")
    assert found == ["static/theme.js", "static/app.js"]
    assert reader.page.locator("iframe, img, main a, [onerror], [onload]").count() == 0
    assert reader.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert reader.watched.foreign(address) == []


def test_flags_withheld_studies_and_corrected_views_are_plain(context, server: StandIn, address: str):
    server.odd = True
    reader = new_reader(context, server, address).open().read()
    page = reader.page
    assert "inverted" in page.locator("figure.view").nth(0).locator(".flags").inner_text()
    assert "Not scored" in page.locator("figure.view").nth(1).locator(".flags").inner_text()
    sources = page.locator(".source").all_inner_texts()
    assert sources == ["from header", "recognised"]
    assert page.locator("#rerun").is_hidden()
    page.locator("figcaption select").first.select_option("AP")
    assert page.locator(".source").first.inner_text() == "corrected"
    with page.expect_response(lambda answer: answer.request.method == "DELETE"):
        page.locator("#rerun").click()
    page.wait_for_selector("#rerun", state="hidden")
    assert server.uploads[1]["views"] == ["AP", ""]
    assert list(server.studies) == ["study0002"]
    assert page.locator(".source").all_inner_texts() == ["given", "recognised"]
    page.locator("figcaption select").nth(1).select_option("RL")
    page.locator("#rerun").click()
    page.wait_for_selector("#rerun", state="hidden")
    assert server.uploads[2]["views"] == ["AP", "RL"]  # the first correction holds
    assert page.locator(".source").all_inner_texts() == ["given", "given"]
    server.withheld = True
    with page.expect_response("**/api/studies"):
        reader.give()
    page.wait_for_selector("#withheld:not([hidden])")
    assert "Findings withheld" in page.locator("#withheld").inner_text()
    assert page.locator(".row .bar").count() == 0
    assert page.locator("[role=option]").count() == 40
    assert "none scored" in page.locator("#counted").inner_text()


def test_files_may_be_dropped_anywhere(reader: Reader):
    drag = """([name, content]) => {
      const moved = new DataTransfer();
      if (content) moved.items.add(new File([Uint8Array.from(content)], "dropped.png", { type: "image/png" }));
      else moved.setData("text/plain", "words");
      const event = new DragEvent(name, { dataTransfer: moved, bubbles: true, cancelable: true });
      document.querySelector("main").dispatchEvent(event);
      return event.defaultPrevented;
    }"""
    page, content = reader.page, list(image_file(1)["buffer"])
    assert page.evaluate(drag, ["drop", None]) is False
    page.evaluate(drag, ["dragenter", content])
    assert page.locator("#curtain").is_visible()
    page.evaluate(drag, ["dragleave", content])
    assert page.locator("#curtain").is_hidden()
    assert page.evaluate(drag, ["dragover", content])
    page.evaluate(drag, ["dragenter", content])
    assert page.evaluate(drag, ["drop", content])
    page.wait_for_selector(".row")
    assert page.locator("#curtain").is_hidden()
    assert page.locator("figure.view").count() == 1


def test_clearing_makes_the_server_forget(reader: Reader):
    reader.read()
    with reader.page.expect_response(lambda answer: answer.request.method == "DELETE") as waiting:
        reader.page.locator("#clear").click()
    assert waiting.value.status == 204
    assert reader.server.studies == {}
    assert reader.page.locator("#welcome").is_visible()
    assert reader.page.locator(".row, canvas").count() == 0
    reader.read()
    reader.page.close()
    give_up = time.monotonic() + 5
    while reader.server.studies and time.monotonic() < give_up:
        time.sleep(0.02)
    assert reader.server.studies == {}


def test_refusals_say_what_to_do(reader: Reader):
    page, server = reader.page, reader.server
    reader.give(*(image_file(n) for n in range(5)))
    assert "up to 4" in page.locator("#alert").inner_text()
    assert server.uploads == []
    server.failures.append((413, error_body("study_too_large", "The study is too large."), {}))
    reader.give()
    page.wait_for_selector("#alert:not([hidden]) >> text=too large")
    assert "64 MB a file and 256 MB a study" in page.locator("#alert").inner_text()
    server.failures.append((413, error_body("too_large", "It has too many pixels.", 1), {}))
    reader.give(image_file(1, "vast.png"), image_file(2))
    page.wait_for_selector("text=Image 1 (vast.png) cannot be used: It has too many pixels.")
    assert page.locator("#alert-words").inner_text().endswith("up to 64 megapixels an image.")
    page.get_by_role("button", name="Go on without it").click()
    page.wait_for_selector(".row")
    assert page.locator("figure.view").count() == 1
    reader.give(image_file(1), {"name": "notes.dcm", "mimeType": "", "buffer": b"no image at all"})
    page.wait_for_selector("text=Image 2 (notes.dcm) cannot be used")
    assert "neither DICOM, PNG nor JPEG" in page.locator("figure.view.refused .flags").inner_text()
    page.get_by_role("button", name="Go on without it").click()
    page.wait_for_selector(".row")
    assert page.locator("figure.view").count() == 1
    server.odd = True
    reader.read()
    page.locator("figcaption select").first.select_option("AP")
    server.failures.append((500, error_body("failed", "It failed."), {}))
    page.locator("#rerun").click()
    page.wait_for_selector("text=It failed.")
    assert "Not scored" in page.locator("figure.view").nth(1).locator(".flags").inner_text()
    assert page.locator("figcaption select").first.input_value() == "AP"
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("text=given")
    assert server.uploads[-1]["views"] == ["AP", ""]
    assert page.locator("#alert").is_hidden()


def test_warnings_of_an_image_outlive_a_refusal(reader: Reader):
    page, server = reader.page, reader.server
    server.odd = True
    reader.read()
    page.locator("figcaption select").first.select_option("AP")
    server.failures.append((422, error_body("unreadable", "It cannot be read.", 1), {}))
    page.locator("#rerun").click()
    page.wait_for_selector("figure.view.refused")
    flags = page.locator("figure.view").first.locator(".flags")
    assert flags.inner_text() == "It cannot be read."
    server.failures.append((500, error_body("failed", "It failed."), {}))
    page.locator("#rerun").click()
    page.wait_for_selector("text=It failed.")
    assert flags.inner_text() == "The grey levels look inverted."
    assert page.locator("figcaption select").first.input_value() == "AP"


def test_a_model_without_thresholds_puts_nothing_above_or_below(reader: Reader):
    page, server = reader.page, reader.server
    server.rules = ()
    reader.open().read()
    assert page.locator("#summary").inner_text() == "no thresholds"
    assert all(page.locator(one).is_hidden() for one in ("#threshold", "#key-threshold"))
    assert page.locator(".row.above, .tick").count() == 0
    assert "threshold" not in reader.row("Cardiomegaly").get_attribute("aria-label")
    assert page.locator("#status").inner_text() == "Findings are here: no thresholds."
    server.rules, server.without = ("f1",), {*FINDINGS} - {"Cardiomegaly"}
    reader.open().read()
    assert page.locator("#summary").inner_text() == "1 of 1 above, 37 without threshold"
    assert page.locator("#threshold").is_visible()


def test_scores_that_are_not_calibrated_are_not_called_probabilities(reader: Reader):
    page, server = reader.page, reader.server
    reader.read()
    assert "probability" in page.locator(".legend").inner_text()
    server.calibrated = False
    server.flags = [{"code": "uncalibrated", "message": "These scores are not calibrated."}]
    reader.open().read()
    assert "probability" not in page.locator(".findings").inner_text().lower()
    assert "score" in page.locator(".legend").inner_text()
    assert page.locator("#sort option").first.inner_text() == "By score"
    assert "These scores are not calibrated." in page.locator("#withheld").inner_text()
    assert "Findings withheld" not in page.locator("#withheld").inner_text()


def test_a_model_that_screens_nothing_does_not_promise_to(reader: Reader):
    page, server = reader.page, reader.server
    assert "what is no chest X-ray is withheld." in page.locator(".promises").inner_text()
    server.screened = False
    reader.open()
    assert "withheld" not in page.locator(".promises").inner_text()
    assert "cannot tell chest X-rays from other pictures" in page.locator(".promises").inner_text()
    reader.read()
    assert page.locator("#withheld p").all_inner_texts() == [NOT_SCREENED]
    assert page.locator(".flags").all_inner_texts() == ["", ""]


@pytest.mark.parametrize("width", [1280, 700])
def test_an_accepted_leak_is_read_beside_the_images(reader: Reader, width: int):
    reader.server.leak = "pretraining met 12 test images"
    reader.page.set_viewport_size({"width": width, "height": 900})
    reader.open().read()
    assert reader.page.locator("#remark").is_visible()
    assert reader.page.locator("#remark").inner_text() == "Accepted leak: pretraining met 12 test images."


def test_a_server_that_could_not_be_told_to_forget_is_not_said_to_have(reader: Reader):
    page, server = reader.page, reader.server
    reader.read()
    server.forgetting = 500
    page.locator("#clear").click()
    page.wait_for_selector("text=could not be told to forget the study: It failed.")
    assert page.locator("#welcome").is_visible()
    assert "is forgotten" not in page.locator("#status").inner_text()
    server.forgetting = 204
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("#alert", state="hidden")
    page.wait_for_selector("#status:text-is('The study is forgotten.')", state="attached")
    assert server.studies == {}
    reader.read()
    server.studies.clear()  # it has forgotten it by itself
    page.locator("#clear").click()
    page.wait_for_selector("#status:text-is('The study is forgotten.')", state="attached")
    assert page.locator("#alert").is_hidden()


def test_a_case_that_is_the_film_itself_is_named(reader: Reader):
    page, server = reader.page, reader.server
    reader.read()
    page.wait_for_selector(".case")
    assert page.locator("#cases-remark").is_hidden()
    server.most_similar = 1.0
    with page.expect_response("**/similar*"):
        reader.give()
    page.wait_for_selector("#cases-remark:not([hidden])")
    page.locator("#clear").click()
    assert page.locator("#cases-remark").is_hidden()


def test_where_the_focus_is_can_be_seen_before_a_row_is_reached(reader: Reader):
    page = reader.page
    reader.read()
    outline = "getComputedStyle(document.querySelector('%s')).outlineStyle"
    page.keyboard.press("/")
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "list":
            break
    assert page.evaluate("document.activeElement.id") == "list"
    assert page.evaluate(outline % "#list") == "solid"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(outline % "#list") == "none"
    assert page.evaluate(outline % ".row.active") == "solid"


def test_a_study_that_is_cleared_while_the_server_introduces_itself_anew_stays_away(reader: Reader):
    page, server = reader.page, reader.server
    held: list = []
    page.route("**/metadata", lambda route: held.append(route))
    server.digest = "another"
    with page.expect_request("**/metadata"):
        reader.give()
    page.locator("#clear").click()
    with page.expect_response(lambda answer: answer.request.method == "DELETE"):
        held[0].continue_()
    assert page.locator("#welcome").is_visible()
    assert page.locator(".row").count() == 0
    assert server.studies == {}


def test_a_busy_server_is_asked_again_after_the_time_it_names(reader: Reader):
    reader.server.failures.append((503, error_body("busy", "Too many studies wait."), {"Retry-After": "2"}))
    reader.give()
    reader.page.wait_for_selector("text=Trying again in 2 s")
    assert reader.page.locator(".row").count() == 0
    assert reader.page.locator("#alert-words").inner_text() == "Too many studies wait."  # what is read aloud stays
    reader.page.wait_for_selector("[role=alert] [aria-hidden=true] >> text=Trying again in 1 s")
    reader.page.wait_for_selector(".row")
    assert reader.page.locator("#alert").is_hidden()
    assert len(reader.server.uploads) == 2


def test_a_token_is_asked_for_and_taken_out_of_the_address(context, server: StandIn, address: str):
    server.token = "a-token-of-many-letters"
    reader = new_reader(context, server, address)
    page = reader.page
    page.goto(address)
    page.wait_for_selector("#token:visible")
    reader.give(image_file(1))  # dropped before the token is there: it waits
    page.locator("#token").fill(server.token)
    page.keyboard.press("Enter")
    page.wait_for_selector("#model:not(:empty)")
    page.wait_for_selector(".row")
    assert page.locator("figure.view").count() == 1
    other = new_reader(context, server, f"{address}/#token={server.token}").open()
    assert other.page.url == f"{address}/"
    other.read()


def test_a_server_that_is_gone_and_comes_back(context, server: StandIn):
    with serving(server.app()) as address:
        port = int(address.rsplit(":", 1)[1])
        reader = new_reader(context, server, address).open().read()
    reader.row("Edema").click()
    reader.page.wait_for_selector("text=The server does not answer")
    with serving(server.app(), port):
        reader.page.wait_for_selector("#alert", state="hidden")
        reader.page.wait_for_selector("figure.view.hot")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1024, 768), (700, 900), (360, 740)])
def test_every_screen_has_room(reader: Reader, width: int, height: int):
    page = reader.page
    page.set_viewport_size({"width": width, "height": height})
    reader.read().choose("Edema")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width > 980:
        assert page.evaluate("document.documentElement.scrollHeight") <= height
        assert page.locator("#image-1").bounding_box()["height"] > 250
    page.mouse.wheel(0, 900)
    notice = page.locator("#notice").bounding_box()
    page.wait_for_timeout(100)
    assert 0 <= page.locator("#notice").bounding_box()["y"] <= height - notice["height"]
    cut = page.evaluate(
        """[...document.querySelectorAll("button, select, h2")]
           .filter(one => one.offsetParent && one.scrollWidth > one.clientWidth + 1)
           .map(one => one.textContent)"""
    )
    assert cut == []


def test_every_control_has_a_name_and_the_list_its_roles(reader: Reader):
    reader.read().choose("Edema")
    nameless = reader.page.evaluate(
        """[...document.querySelectorAll("button, input, select, canvas[tabindex], [role=listbox], [role=region]")]
           .filter(one => ![one.getAttribute("aria-label"), one.labels?.[0]?.textContent, one.textContent]
             .some(words => words?.trim()))
           .map(one => one.outerHTML)"""
    )
    assert nameless == []
    described = reader.page.locator("#list").aria_snapshot()
    assert described.startswith('- listbox "Findings"')
    assert len(re.findall(r"- '?option ", described)) == 40
    assert re.search(r'option "Edema: 31 %.*" \[selected\]', described)
    ids = reader.page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))


def test_reduced_motion_moves_nothing(context, server: StandIn, address: str):
    server.pause = 1.0
    reader = new_reader(context, server, address)
    reader.page.emulate_media(reduced_motion="reduce")
    reader.open().give()
    reader.page.wait_for_selector("#progress:not([hidden])")
    assert reader.page.evaluate("getComputedStyle(document.getElementById('progress-bar')).animationName") == "none"
    reader.page.wait_for_selector(".row")
