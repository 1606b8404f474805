"""Names in any script: drawn by a font that has them, or said."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from overlock import fonts
from overlock.drawing import draw_legend
from overlock.fonts import font_for

CAT, DOG, OWL = "猫", "犬", "ふくろう"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """One without fonts, and a function that gives it one with squares as the glyphs of some characters."""
    builder = pytest.importorskip("fontTools.fontBuilder")
    pen = pytest.importorskip("fontTools.pens.ttGlyphPen")

    def glyph(side):
        drawn = pen.TTGlyphPen(None)
        drawn.moveTo((0, 0))
        for corner in ((0, side), (side, side), (side, 0)):
            drawn.lineTo(corner)
        drawn.closePath()
        return drawn.glyph()

    def add(name, characters):
        names = [".notdef", *(f"uni{ord(one):04X}" for one in characters)]
        font = builder.FontBuilder(1000, isTTF=True)
        font.setupGlyphOrder(names)
        font.setupCharacterMap({ord(one): f"uni{ord(one):04X}" for one in characters})
        font.setupGlyf({one: glyph(300 if one == ".notdef" else 900) for one in names})
        font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
        font.setupHorizontalHeader(ascent=900, descent=-100)
        font.setupNameTable(dict(familyName=name, styleName="Regular"))
        font.setupOS2()
        font.setupPost()
        font.save(tmp_path / f"{name}.ttf")
        clear()

    def clear():
        for cached in (fonts._find, fonts._tell, fonts._font_files):
            cached.cache_clear()

    monkeypatch.setattr(fonts, "font_folders", lambda: [tmp_path, tmp_path / "nowhere"])
    clear()
    yield add
    clear()


def dark_share(text):
    """Of the pixels of a text of one character."""
    picture = Image.new("L", (40, 40), 255)
    ImageDraw.Draw(picture).text((0, 0), text, font=font_for(text, 40), fill=0)
    return float((np.asarray(picture) < 128).mean())


def test_pillow_s_own_font_is_used_where_it_can_be(machine):
    machine("squares", "a" + CAT)
    for text in ("", "cat", "cat 97 %", "naïve"):
        assert font_for(text, 13).getname() == ImageFont.load_default(13).getname()
        assert font_for(text, 13).size == 13


def test_a_font_of_the_machine_is_found_and_drawn(machine, caplog):
    machine("squares", CAT)
    assert font_for(CAT, 20).getname()[0] == "squares"
    assert font_for(f"cat {CAT}", 20).getname()[0] == "squares"
    assert dark_share(CAT) > 0.5  # a missing glyph is a small square
    assert caplog.text == ""
    legend = np.asarray(draw_legend([CAT], [0], height=40).convert("L"))
    assert (legend[:, 28:] < 100).sum() > 50


def test_what_no_font_has_is_said_once(machine, caplog):
    with caplog.at_level(logging.WARNING):
        for size in (12, 15, 12):
            assert font_for(DOG, size).getname() == ImageFont.load_default(size).getname()
    assert caplog.text.count(f"no font on this machine has all of the characters {DOG}, which are drawn as boxes") == 1
    assert "install one that has" in caplog.text


def test_the_font_with_the_most_of_the_characters(machine, tmp_path, caplog):
    machine("one", OWL[0])
    machine("two", OWL[:2])
    (tmp_path / "aaa.ttf").write_bytes(b"no font")
    (tmp_path / "notes.txt").write_text("no font")
    with caplog.at_level(logging.WARNING):
        assert font_for(OWL, 12).getname()[0] == "two"
    assert "no font on this machine has all of the characters" in caplog.text
    machine("all", OWL)
    assert font_for(OWL, 12).getname()[0] == "all"


def test_preferred_and_plain_fonts_come_first(machine):
    for name in ("zebra-bold", "alpha", "notosans-bold", "notosans"):
        machine(name, CAT)
    assert font_for(CAT, 12).getname()[0] == "notosans"


def test_the_folders_of_this_machine():
    assert fonts.font_folders()
    assert all(folder.is_absolute() for folder in fonts.font_folders())
