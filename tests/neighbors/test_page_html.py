"""The page of neighbours as a file: complete, escaped, self-contained and within its size limit."""

import base64
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explorers import drawn, make_explorer, random_explorer
from html_page import HtmlPage
from PIL import Image

from msf_faiss.errors import UserError
from msf_faiss.neighbors import page_html as page_module
from msf_faiss.neighbors.page_html import displayable, render_page, write_page

HOSTILE = "\"'></script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)><!--&amp;{{ 7*7 }}"


class Page(HtmlPage):
    @property
    def documents(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The data and the pictures."""
        _, data, pictures = self.texts["script"]
        return json.loads(data), json.loads(pictures)


def decoded(picture: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    assert image.format == "WEBP"
    return image.convert("RGB")


def test_head_shows_run_protocol_and_figures() -> None:
    explorer = random_explorer()
    words = Page(render_page(explorer)).words
    assert "after step 1,234, epoch 39.81" in words
    assert "compared with the 3,000 entries of the checkpoint’s bank" in words
    summary = explorer.statistics.summary
    assert f"{summary.purity:.1%}" in words
    low, high = summary.purity_interval
    assert f"95% interval {low:.1%} to {high:.1%}" in words
    assert "chance: 33.3%" in words
    assert "73% full: 3,000 of 4,096 entries, bfloat16" in words
    assert f"{summary.similarity:.3f} mean cosine between" in words


def test_searched_dataset_has_no_ages() -> None:
    page = Page(render_page(random_explorer(aged=False)))
    assert "all 3,000 training images, except itself" in page.words
    assert "age" not in re.findall(r"\w+", page.words)
    assert page.documents[0]["ages"] is None
    assert page.documents[0]["statistics"]["age"] is None


def test_data_matches_explorer() -> None:
    explorer = random_explorer(
        20, k=30, with_evolution=True, clusters=4, with_map=True, incomplete=[3, 5], queries=[7, 2], order="worst"
    )
    data, _ = Page(render_page(explorer)).documents
    graph = explorer.graph
    assert data["queries"] == [7, 2]
    assert data["order"] == "worst"
    assert data["complete"] == [0 if node in (3, 5) else 1 for node in range(20)]
    assert data["names"] == list(explorer.nodes.names)
    assert data["clusterOf"] == explorer.cluster_of.tolist()
    confusion = explorer.statistics.confusion
    assert data["statistics"]["confusion"]["counts"] == confusion.counts.tolist()
    assert [pair[:2] for pair in data["review"]["pairs"]] == [list(pair[:2]) for pair in explorer.pairs]
    assert [node for node, _ in data["review"]["outliers"]] == [node for node, _ in explorer.outliers]
    for node in range(20):  # there are only 19 other images
        assert data["neighbors"][node] == graph.neighbors[node, :19].tolist()
        assert data["ages"][node] == graph.ages[node, :19].tolist()
        # written in steps of 1e-5
        np.testing.assert_allclose(np.array(data["similarities"][node]) / 1e5, graph.similarities[node, :19], atol=6e-6)
    for moment, written in zip(explorer.evolution, data["evolution"], strict=True):
        assert written["neighbors"] == [row[row >= 0].tolist() for row in moment.neighbors]
        assert (written["step"], written["purity"]) == (moment.step, moment.purity)
    assert [cluster["members"] for cluster in data["clusters"]] == [list(c.members) for c in explorer.clusters]
    assert data["map"]["nodes"] == list(range(20))
    np.testing.assert_allclose(np.array(data["map"]["positions"]) / 1e4, explorer.map.positions, atol=6e-5)


def test_missing_parts_have_no_section() -> None:
    every = {"explore", "statistics", "review", "evolution", "clusters", "map"}
    for options, missing in (
        ({}, {"evolution", "clusters", "map"}),
        ({"with_evolution": True}, {"clusters", "map"}),
        ({"clusters": 2}, {"evolution", "map"}),
        ({"with_map": True}, {"evolution", "clusters"}),
    ):
        page = Page(render_page(random_explorer(**options)))
        assert {link.get("data-section") for link in page.all("a")} - {None} == every - missing
        assert {section["id"] for section in page.all("section")} == {f"view-{key}" for key in every - missing} | {
            "view-image"
        }


def test_security_policy_allows_only_the_pages_own_style_and_script() -> None:
    page = Page(render_page(random_explorer(with_evolution=True, clusters=2, with_map=True)))
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in (policy or "").split(";"))
    code, style = page.texts["script"][0], page.texts["style"][0]
    assert rules == {
        "default-src": "'none'",
        "img-src": "data: blob:",
        "style-src": f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'",
        "script-src": f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
    }
    assert not {"link", "iframe", "object", "embed", "base", "form", "img"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert "style" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert set(re.findall(r"https?://[^\"'\s]+", code + style)) == {
        "http://www.w3.org/2000/svg"
    }  # a namespace, not an address
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|\beval\b|Function\(|url\(|@import", code + style)


def test_hostile_names_are_escaped() -> None:
    count = 6
    names = [HOSTILE] * count
    classes = (HOSTILE, "dots", "rings")
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(count, 4)).astype(np.float32)
    labels = np.zeros(count, np.int64)

    def page(**options: Any) -> Page:
        return Page(
            render_page(make_explorer(embeddings, labels, clusters=1, with_map=True, evolution=[embeddings], **options))
        )

    plain, hostile = page(), page(names=names, classes=classes, run=HOSTILE.replace("/", "|"))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert not any(set("<>&") & set(text) for text in hostile.texts["script"][1:])  # the JSON cannot close its element
    data, _ = hostile.documents
    assert data["names"] == names
    assert data["classes"][0].startswith(HOSTILE[:50])
    assert data["statistics"]["purityByClass"][0][0] == data["classes"][0]
    assert HOSTILE.replace("/", "|") in hostile.words


@pytest.mark.parametrize(
    ("name", "as_shown"),
    [
        ("plain.png", "plain.png"),
        ("Ελλάδα/日本/😀👩‍🚀.png", "Ελλάδα/日本/😀👩‍🚀.png"),
        ("a\0b\nc\x1bd\x85e", "a�b�c�d�e"),
        ("\ud83d lone \udc80", "� lone �"),
        ("photo\u202egnp.exe\u2066\u2028\u200f", "photo�gnp.exe���"),
        ("x" * 480, "x" * 480),
        ("a" * 5000 + "b" * 5000, "a" * 320 + "…" + "b" * 159),
    ],
)
def test_control_characters_are_replaced(name: str, as_shown: str) -> None:
    assert displayable(name) == as_shown
    explorer = random_explorer(2, names=[name, "b"], kinds=1, classes=(name,), run=name)
    page = Page(render_page(explorer).encode().decode())  # valid UTF-8
    # the script replaces control characters where it shows names; copied names keep them
    shortened = as_shown if len(name) > 480 else name
    assert page.documents[0]["names"][0] == re.sub("[\ud800-\udfff]", "�", shortened)
    assert len(page.documents[0]["classes"][0]) <= 80


@pytest.mark.parametrize("side", [8, 28, 64])
def test_small_pictures_are_lossless(side: int) -> None:
    _, pictures = Page(render_page(random_explorer(5, pictures=drawn(5, side)))).documents
    assert (pictures["side"], pictures["small"]) == (side, True)
    for written, picture in zip(pictures["images"], drawn(5, side), strict=True):
        np.testing.assert_array_equal(np.asarray(decoded(written)), np.asarray(picture))


def test_large_pictures_are_nearly_lossless() -> None:
    _, pictures = Page(render_page(random_explorer(3, pictures=drawn(3, 192)))).documents
    assert (pictures["side"], pictures["small"]) == (192, False)
    for written, picture in zip(pictures["images"], drawn(3, 192), strict=True):
        # quality 82 with half the colour resolution, along the edges of saturated squares
        assert np.abs(np.asarray(decoded(written), float) - np.asarray(picture, float)).mean() < 6


def test_picture_side_shrinks_with_number_of_pictures() -> None:
    sides = [page_module._picture_side(192, count) for count in (1, 1_600, 3_000, 4_000, 10_000, 300_000, 10**9)]
    assert sides == [192, 192, 141, 122, 77, 16, 16]
    assert page_module._picture_side(32, 3_000) == 32
    assert page_module._picture_side(8, 10**9) == 8
    assert all(count * page_module._picture_side(192, count) ** 2 <= 60_000_000 for count in range(1, 200_000, 997))


@pytest.mark.parametrize("side", [48, 128])
def test_pictures_shrink_until_page_fits(side: int) -> None:
    """Noise is the worst case: no photograph needs as many bytes."""
    rng = np.random.default_rng(0)
    noise = tuple(Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(30))
    explorer = random_explorer(30, pictures=noise)
    budget = 200_000  # the page itself takes about 100,000
    assert len(render_page(explorer).encode()) > budget
    page = render_page(explorer, max_bytes=budget)
    assert len(page.encode()) <= budget
    _, pictures = Page(page).documents
    assert 16 <= pictures["side"] < side
    assert {decoded(written).size for written in pictures["images"]} == {(pictures["side"],) * 2}
    assert pictures["small"] == (side <= 64)


def test_long_names_and_many_neighbors_leave_room_for_pictures() -> None:
    count = 3_000
    explorer = random_explorer(count, k=50, names=["\N{CJK UNIFIED IDEOGRAPH-6F22}" * 10_000] * count)
    data = page_module._to_json(page_module._page_data(explorer))
    assert len(data.encode()) < 30_000_000 / 4  # pictures take up to four fifths


def test_single_image_has_no_neighbors_and_no_purity() -> None:
    for kinds in (0, 1):
        page = Page(render_page(random_explorer(1, kinds=kinds, with_map=True, clusters=1)))
        assert page.documents[0]["neighbors"] == [[]]
        assert "Purity" not in page.words
    assert "From the neighbours of 1 random image." in page.words


def test_unwritable_path_is_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"page\.html: cannot write: "):
        write_page(random_explorer(2), tmp_path / "file" / "page.html")
