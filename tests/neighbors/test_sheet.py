"""The sheet: size, layout, frames, and odd inspections."""

from pathlib import Path

import pytest
from PIL import Image

from msf_faiss.neighbors.sheet import draw_sheet, write_sheet


def colors(sheet: Image.Image) -> dict[tuple[int, ...], int]:
    return {color: count for count, color in sheet.getcolors(maxcolors=1 << 24)}


def test_sheet_is_png_of_expected_size(make_inspection, tmp_path: Path) -> None:
    path = tmp_path / "new" / "sheet.png"
    write_sheet(make_inspection(queries=3, k=8), path)
    with Image.open(path) as sheet:
        # 32 px are enlarged to 128; with frames 136, with a gap 150. Left of the neighbours: 32 + 150 + 28
        assert sheet.format == "PNG"
        assert sheet.size == (210 + 8 * 150 - 14 + 32, 92 + 3 * (14 + 150 + 44) + 32)
    assert list(path.parent.iterdir()) == [path]


def test_eleventh_neighbor_starts_a_new_line(make_inspection) -> None:
    ten, eleven = (draw_sheet(make_inspection(queries=1, k=k)) for k in (10, 11))
    assert ten.width == eleven.width
    assert eleven.height - ten.height == 150 + 44


def test_small_pictures_are_enlarged_without_smoothing(make_inspection) -> None:
    inspection = make_inspection(queries=1, k=1)
    sheet = draw_sheet(inspection)
    query = inspection.thumbnails.queries[0]
    shown = sheet.crop((36, 110, 36 + 128, 110 + 128))
    assert shown.tobytes() == query.resize((128, 128), Image.Resampling.NEAREST).tobytes()


def test_frame_colors_show_matches(make_inspection) -> None:
    green, orange, grey = (15, 118, 110), (194, 65, 12), (201, 197, 192)
    matched = colors(draw_sheet(make_inspection(classes=("dots",))))
    assert matched[green] > 1000
    assert orange not in matched
    mixed = colors(draw_sheet(make_inspection(queries=3, k=6)))
    assert mixed[green] > 1000
    assert mixed[orange] > 1000
    unlabelled = colors(draw_sheet(make_inspection(classes=None)))
    assert unlabelled[grey] > 1000
    assert green not in unlabelled
    assert orange not in unlabelled


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0, "requested": 5},
        {"side": 192},
        {"searched": "dataset"},
        {"classes": ("a very long name of a class that has no room below its picture", "", "\n\x1b[31m ünï 中")},
    ],
)
def test_unusual_inspections_can_be_drawn(make_inspection, options) -> None:
    sheet = draw_sheet(make_inspection(**options))
    assert sheet.mode == "RGB"
    assert min(sheet.size) > 300


def test_sheet_needs_thumbnails(make_inspection) -> None:
    with pytest.raises(ValueError, match="needs thumbnails"):
        draw_sheet(make_inspection(thumbnails=False))
