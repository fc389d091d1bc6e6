"""The page at a glance: one study in a real browser before a stand-in server, and what its files may not contain.

Everything else that a reader does is in `test_reader.py`, the page before the real server in `test_page_served.py`.
"""

import re

from stand_in import FINDINGS, STATIC


def test_two_images_give_forty_rows_an_overlay_and_similar_cases(reader):
    reader.read()
    assert sorted(reader.names()) == sorted(FINDINGS)
    assert reader.colours() == reader.colours(2) == 0
    reader.page.wait_for_selector(".case")
    assert reader.page.locator(".case").count() == 8
    reader.choose("Cardiomegaly").settle()
    assert reader.colours() > 50
    assert reader.colours(2) > 50
    shares = [int(text.split()[0]) for text in reader.page.locator(".contribution").all_inner_texts()]
    assert len(shares) == 2
    assert 99 <= sum(shares) <= 101
    assert "83" not in reader.page.locator("#detail").inner_text()
    assert "Cardiomegaly" in reader.page.locator("#detail").inner_text()
    assert reader.watched.foreign(reader.address) == []
    assert reader.watched.troubles == []


def test_files_of_the_page_ask_for_nothing_else_and_write_no_markup():
    for path in sorted(STATIC.iterdir()):
        text = path.read_text(encoding="utf-8").replace('"http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//[a-z0-9.-]+\.[a-z]{2,}/|@import|url\(", text), path.name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|DOMParser", text
        ), path.name
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\sstyle=|\son[a-z]+=|<style|javascript:", page)
    assert re.findall(r"<script[^>]*>([^<]*)</script>", page) == ["", ""]
    ids = set(re.findall(r'id="([^"]+)"', page))
    for path in STATIC.glob("*.js"):
        assert set(re.findall(r'byId\("([^"]+)"\)', path.read_text(encoding="utf-8"))) <= ids, path.name


def test_colours_have_contrast_in_both_themes():
    style = (STATIC / "hilum.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root(?:\[data-theme=\"light\"\])? \{(.*?)\n\}", style, re.DOTALL)
    dark = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})\b", blocks[0]))
    for theme in (dark, dark | dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})\b", blocks[1]))):
        for ink in ("ink", "soft", "danger", "accent"):
            for paper in ("room", "panel", "raised"):
                assert contrast(theme[ink], theme[paper]) >= 4.5, (ink, paper)
        assert contrast(theme["ink"], theme["pressed"]) >= 7
        assert contrast(theme["soft"], theme["pressed"]) >= 4.5
        for ink, paper in (("notice-ink", "notice"), ("alert-ink", "alert"), ("accent-ink", "accent")):
            assert contrast(theme[ink], theme[paper]) >= 4.5, (ink, paper)
        for mark in ("bar-above", "tick", "whisker", "head", "medium", "tail"):
            assert contrast(theme[mark], theme["panel"]) >= 3, mark


def contrast(one: str, other: str) -> float:
    """Ratio of WCAG 2.2 between two colours as #rrggbb or #rgb."""

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
