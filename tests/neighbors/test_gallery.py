"""The gallery page: complete, escaped, and without anything outside of it."""

import base64
import html.parser
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from msf_faiss.errors import UserError
from msf_faiss.neighbors.gallery import render_gallery, write_gallery

HOSTILE = "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>&amp;{{ 7*7 }}"
VOID = {"meta", "img", "rect", "line", "path", "br"}


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_shows_every_record(make_inspection) -> None:
    inspection = make_inspection(queries=3, k=4)
    page = Page(render_gallery(inspection))
    assert len(page.all("article")) == 3
    assert len(page.all("img")) == 3 * (1 + 4)
    words = " ".join(page.text.split())
    assert "step 1,234" in words
    assert "73% full: 3,000 of 4,096 entries" in words
    assert f"{inspection.summary.purity:.1%}" in words
    for query in inspection.queries:
        assert query.name in words
        assert f"own entry: similarity 0.987, age {query.own.age}" in words
        assert f"{query.matching} of 4 match" in words
        for neighbor in query.neighbors:
            assert neighbor.name in words
            assert f"age {neighbor.age:,}" in words


def test_nothing_is_loaded_from_outside(make_inspection) -> None:
    page = render_gallery(make_inspection())
    assert not re.search(r"https?:|//\w", re.sub(r"data:image/[a-z]+;base64,[\w+/=]+", "", page))
    assert "url(" not in page
    assert "@import" not in page
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in parsed.tags}
    for _, attributes in parsed.tags:
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    (policy,) = [meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_hostile_names_are_only_text(make_inspection) -> None:
    plain = Page(render_gallery(make_inspection()))
    page = Page(
        render_gallery(
            make_inspection(
                classes=(HOSTILE, "dots", "rings"), name=HOSTILE.replace("{", "{{").replace("}", "}}") + "{}"
            )
        )
    )
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert HOSTILE in page.text
    assert any(HOSTILE in (image["alt"] or "") for image in page.all("img"))


def test_matches_are_told_without_colour_too(make_inspection) -> None:
    inspection = make_inspection()
    page = Page(render_gallery(inspection))
    alts = [image["alt"] or "" for image in page.all("img")]
    matches = [neighbor.matches for query in inspection.queries for neighbor in query.neighbors]
    assert True in matches
    assert False in matches
    assert sum("same class" in alt for alt in alts) == matches.count(True)
    assert sum("another class" in alt for alt in alts) == matches.count(False)
    assert all(alts)


@pytest.mark.parametrize("side", [8, 28, 32, 64, 192])
def test_thumbnails_are_embedded_in_the_smaller_format(make_inspection, side: int) -> None:
    inspection = make_inspection(queries=1, k=1, side=side)
    page = render_gallery(inspection)
    for image in Page(page).all("img"):
        kind, encoded = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", image["src"] or "").groups()
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as decoded:
            assert decoded.format == kind.upper()
            assert decoded.size == (side, side)
        if side <= 64:
            assert int(image["width"] or 0) % side == 0  # all pixels equally large
    assert ("image-rendering: pixelated" in page) == (side <= 64)


def test_without_labels_nothing_is_said_of_matches(make_inspection) -> None:
    page = Page(render_gallery(make_inspection(classes=None)))
    words = " ".join(page.text.split())
    assert "Similarity by rank" in words
    assert "match" not in words.split("Similarity by rank")[1].replace("Match", "")
    assert "Purity" not in words
    assert "class" not in " ".join(image["alt"] or "" for image in page.all("img"))


def test_a_searched_data_set_has_no_ages(make_inspection) -> None:
    words = " ".join(Page(render_gallery(make_inspection(searched="dataset"))).text.split())
    body = words[words.index("Nearest neighbours") :]
    assert "all 3,000 training images" in body
    assert "bank" not in body
    assert "age" not in re.findall(r"\w+", body)


def test_no_other_image_and_too_few_of_them(make_inspection) -> None:
    words = Page(render_gallery(make_inspection(k=0, asked=5))).text
    assert "There is no other image to retrieve" in words
    assert "own entry: similarity 0.987" in words
    assert "5 neighbours were asked for" in Page(render_gallery(make_inspection(k=4, asked=5))).text
    assert "were asked for" not in Page(render_gallery(make_inspection(k=4))).text


def test_many_neighbours_leave_values_out_of_the_chart(make_inspection) -> None:
    few, many = (Page(render_gallery(make_inspection(queries=1, k=k))) for k in (12, 60))
    values = [sum(text.get("class") == "value" for text in page.all("text")) for page in (few, many)]
    assert values == [12, 0]
    assert len(many.all("rect")) == 60


def test_the_file_appears_whole_in_a_new_folder_and_replaces_an_older_one(make_inspection, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "gallery.html"
    path.parent.mkdir(parents=True)
    path.write_text("old")
    write_gallery(make_inspection(), path)
    assert path.read_text(encoding="utf-8") == render_gallery(make_inspection())
    assert list(path.parent.iterdir()) == [path]


def test_an_unwritable_place_is_an_error_in_words(make_inspection, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"gallery\.html: cannot be written: "):
        write_gallery(make_inspection(), tmp_path / "file" / "gallery.html")


def test_a_gallery_needs_thumbnails(make_inspection) -> None:
    with pytest.raises(ValueError, match="needs the thumbnails"):
        render_gallery(make_inspection(thumbnails=False))
