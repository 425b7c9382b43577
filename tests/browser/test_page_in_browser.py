"""The page of neighbours in Chromium: pointer, keyboard, layout, accessibility and hostile names."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from explorers import make_explorer, random_explorer
from playwright.sync_api import Locator, Page, expect

from msf_faiss.neighbors.page_content import ClassPurity, Explorer

pytestmark = pytest.mark.browser

Visit = Callable[..., Page]

SECTIONS = ("explore", "statistics", "review", "evolution", "clusters", "map")
expect.set_options(timeout=20_000)  # for busy machines
HOSTILE = (
    '<img src=x onerror="window.broken=1; alert(1)">',
    "</script x><script>alert(2)</script><!--",
    "<!--<script ",
    "'\"><svg/onload=alert(3)>",
    "مرحبا \u202egnp.exe",
    "😀👩‍🚀 ünï\0cödé\ud800",
    "x" * 10_000,
    "{{ 7*7 }} ${7*7} &lt;b&gt;",
)


@pytest.fixture(scope="module")
def complete() -> Explorer:
    """A page with all sections."""
    return random_explorer(60, k=8, with_evolution=True, clusters=4, with_map=True, incomplete=range(40, 60))


def neighbors_of(explorer: Explorer, node: int) -> list[int]:
    return [int(other) for other in explorer.graph.neighbors[node] if other >= 0]


def neighbor_tiles(page: Page) -> Locator:
    """The neighbours of the open query."""
    return page.locator("#view-image .group:not(.retrievers) .neighbors a")


def nodes(tiles: Locator) -> list[int]:
    return [int(node) for node in tiles.evaluate_all("tiles => tiles.map(tile => tile.dataset.node)")]


def expect_query(page: Page, explorer: Explorer, node: int) -> None:
    """Check that the page shows `node` as the query, with its neighbours and its own picture."""
    expect(page).to_have_url(re.compile(rf"#image-{node}$"))
    expect(page.locator("#view-image .trail [aria-current]")).to_have_attribute("data-node", str(node))
    assert nodes(neighbor_tiles(page)) == neighbors_of(explorer, node)
    label, name = explorer.nodes.labels[node], explorer.nodes.names[node]
    if explorer.classes and label >= 0:
        expect(page.locator("#view-image h2")).to_have_text(explorer.classes[label])
    expect(page.locator("#view-image .facts .name")).to_contain_text(name)
    large = page.locator("#view-image .large img").get_attribute("src")
    assert large == page.locator("#view-image .trail [aria-current] img").get_attribute("src")


def focused(page: Page) -> int | None:
    """The focused node."""
    node = page.evaluate("document.activeElement.dataset.node")
    return None if node is None else int(node)


def test_ten_clicks_and_back(visit: Visit, complete: Explorer) -> None:
    page = visit(complete)
    first = page.locator("#queries .query").nth(1).locator(".neighbors a").nth(2)
    seen = {}  # source of a node's picture
    path = [neighbors_of(complete, complete.queries[1])[2]]
    seen[path[0]] = first.locator("img").get_attribute("src")
    first.click()
    rng = np.random.default_rng(0)
    for _ in range(9):
        expect_query(page, complete, path[-1])
        assert page.locator("#view-image .large img").get_attribute("src") == seen[path[-1]]
        rank = int(rng.integers(8))
        clicked = neighbor_tiles(page).nth(rank)
        path.append(neighbors_of(complete, path[-1])[rank])
        assert int(clicked.get_attribute("data-node") or -1) == path[-1]
        seen.setdefault(path[-1], clicked.locator("img").get_attribute("src"))
        clicked.click()
    expect_query(page, complete, path[-1])
    assert len(set(seen.values())) == len(seen)  # all pictures differ
    assert nodes(page.locator("#view-image .trail li a")) == path
    for node in reversed(path[:-1]):
        page.go_back()
        expect_query(page, complete, node)
    page.go_back()
    expect(page.locator("#view-explore")).to_be_visible()
    page.go_forward()
    page.go_forward()
    expect_query(page, complete, path[1])


def test_pictures_belong_to_their_images(visit: Visit, complete: Explorer) -> None:
    page = visit(complete)
    pixels = page.evaluate("""async () => {
        const found = {};
        for (const image of document.querySelectorAll("#queries .neighbors img")) {
            await image.decode();
            const context = new OffscreenCanvas(16, 16).getContext("2d");
            context.drawImage(image, 0, 0);
            found[image.closest("a").dataset.node] = [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        }
        return found;
    }""")
    assert len(pixels) > 20
    for node, color in pixels.items():
        assert tuple(color) == complete.nodes.pictures[int(node)].getpixel((0, 0))


def test_trail_leads_back_to_any_step(visit: Visit, complete: Explorer) -> None:
    page = visit(complete, "#image-0")
    path = [0]
    for rank in (3, 1, 4):
        path.append(neighbors_of(complete, path[-1])[rank])
        neighbor_tiles(page).nth(rank).click()
        expect_query(page, complete, path[-1])
    page.locator("#view-image .trail li a").nth(1).click()
    expect_query(page, complete, path[1])
    assert nodes(page.locator("#view-image .trail li a")) == path[:2]
    page.get_by_role("button", name="Back").click()
    expect_query(page, complete, path[3])


def test_back_restores_scroll_and_focus(visit: Visit) -> None:
    explorer = random_explorer(60, k=8, queries=range(30))
    page = visit(explorer)
    tile = page.locator("#queries .query").nth(17).locator(".neighbors a").nth(5)
    tile.scroll_into_view_if_needed()
    top = "document.activeElement.getBoundingClientRect().top"
    tile.focus()
    before = page.evaluate(top)
    assert page.evaluate("scrollY") > 1000
    tile.click()
    expect_query(page, explorer, neighbors_of(explorer, 17)[5])
    assert page.evaluate("scrollY") == 0
    page.go_back()
    expect(tile).to_be_focused()
    assert abs(page.evaluate(top) - before) < 3  # scrolling rounds to whole pixels


def test_links_open_their_view_and_invalid_ones_the_grid(visit: Visit, complete: Explorer) -> None:
    page = visit(complete, "#image-7")
    expect_query(page, complete, 7)
    page.get_by_role("button", name="Back").click()  # there is no earlier entry
    expect(page.locator("#view-explore")).to_be_visible()
    for wrong in ("#image-60", "#image--1", "#image-1e1", "#image", "#nowhere", "#view-map", "#%00%F0"):
        page.goto(page.url.partition("#")[0] + wrong)
        expect(page.locator("#view-explore")).to_be_visible()
    page.goto(page.url.partition("#")[0] + "#map")
    expect(page.locator("#view-map")).to_be_visible()


def test_grid_shows_neighbors_with_similarity_class_and_age(visit: Visit, complete: Explorer) -> None:
    page = visit(complete)
    cards = page.locator("#queries .query")
    expect(cards).to_have_count(len(complete.queries))
    for place, query in enumerate(complete.queries):
        tiles = cards.nth(place).locator(".neighbors li")
        assert nodes(tiles.locator("a")) == neighbors_of(complete, query)
        words = tiles.all_inner_texts()
        labels = tiles.locator("a").evaluate_all("links => links.map(link => link.ariaLabel)")
        kinds = tiles.evaluate_all(
            "tiles => tiles.map(tile => [tile.className, tile.querySelectorAll('.mark').length])"
        )
        for rank, node in enumerate(neighbors_of(complete, query)):
            similarity, age = complete.graph.similarities[query, rank], int(complete.graph.ages[query, rank])
            same = complete.nodes.labels[query] == complete.nodes.labels[node]
            assert words[rank].split("\n") == [
                f"{similarity:.3f}",
                complete.classes[complete.nodes.labels[node]],
                f"age {age:,}",
            ]
            assert kinds[rank] == [f"tile {'match' if same else 'mismatch'}", 1]
            assert labels[rank] == (
                f"Neighbour {rank + 1}, similarity {similarity:.3f}, age {age:,}, "
                f"{complete.classes[complete.nodes.labels[node]]}, {'same' if same else 'different'} class"
            )


def test_incomplete_neighbors_have_a_note(visit: Visit, complete: Explorer) -> None:
    page = visit(complete, "#image-45")
    expect(page.locator("#view-image .note")).to_contain_text("Nearest among the 60 images on this page")
    page.goto(page.url.replace("45", "4"))
    expect(page.locator("#view-image .note")).to_have_count(0)


def test_retrievers_and_table_of_neighbors(visit: Visit, complete: Explorer) -> None:
    node = int(np.bincount(complete.graph.neighbors.ravel()).argmax())
    page = visit(complete, f"#image-{node}")
    asking = {int(row) for row in np.flatnonzero((complete.graph.neighbors == node).any(1))}
    assert set(nodes(page.locator(".retrievers a"))) == asking
    page.get_by_text("Names and numbers").click()
    row = page.locator("#view-image tbody tr").first
    other = neighbors_of(complete, node)[0]
    cells = row.locator("td").all_inner_texts()
    assert cells[0] == "1"
    assert cells[1] == f"{complete.nodes.ids[other]:,}"
    assert abs(float(cells[2]) - complete.graph.similarities[node, 0]) < 6e-6
    assert cells[-1] == complete.nodes.names[other]


def test_keyboard_navigation(visit: Visit, complete: Explorer) -> None:
    page = visit(complete)
    first, second = complete.queries[:2]
    page.keyboard.press("ArrowRight")
    assert focused(page) == neighbors_of(complete, first)[0]
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert focused(page) == neighbors_of(complete, first)[2]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("ArrowDown")
    assert focused(page) == neighbors_of(complete, second)[2]
    page.keyboard.press("End")
    assert focused(page) == neighbors_of(complete, second)[7]
    page.keyboard.press("Home")
    node = neighbors_of(complete, second)[0]
    assert focused(page) == node
    page.keyboard.press("Enter")
    expect_query(page, complete, node)
    expect(page.locator("#announcement")).to_contain_text("Query: ")
    for rank in (0, 1, 2, 3):
        assert focused(page) == neighbors_of(complete, node)[0]
        for _ in range(rank):
            page.keyboard.press("ArrowRight")
        before, node = node, neighbors_of(complete, node)[rank]
        page.keyboard.press("Enter")
        expect_query(page, complete, node)
    page.keyboard.press("Backspace")
    expect_query(page, complete, before)
    assert focused(page) == node  # focus is restored
    for _ in range(4):
        page.keyboard.press("Escape")
    expect(page.locator("#view-explore")).to_be_visible()
    assert focused(page) == neighbors_of(complete, second)[0]


def test_each_list_is_one_tab_stop(visit: Visit, complete: Explorer) -> None:
    page = visit(complete)
    page.locator("#order").focus()
    stops = []
    for _ in range(4):
        page.keyboard.press("Tab")
        stops.append(focused(page))
    one, two = complete.queries[:2]
    assert stops == [one, neighbors_of(complete, one)[0], two, neighbors_of(complete, two)[0]]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert focused(page) == neighbors_of(complete, two)[1]


def test_search(visit: Visit, complete: Explorer) -> None:
    page = visit(complete)
    page.keyboard.press("/")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type(str(complete.nodes.ids[33]))
    assert nodes(page.locator("#results a"))[0] == 33
    page.keyboard.press("Enter")
    expect_query(page, complete, 33)
    expect(page.locator("#results")).to_be_hidden()
    page.keyboard.press("/")
    page.keyboard.type("CLASS 2")
    expected = np.flatnonzero(complete.nodes.labels == 2).tolist()
    assert nodes(page.locator("#results a"))[: len(expected)] == expected  # before images with a 2 in their number
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect_query(page, complete, expected[1])
    page.keyboard.press("/")
    page.keyboard.type("nothing of the kind")
    expect(page.locator("#results")).to_contain_text("No image")
    page.keyboard.press("Escape")
    expect(page.locator("#results")).to_be_hidden()
    expect(page.locator("#search")).not_to_be_focused()
    expect_query(page, complete, expected[1])  # Escape closed only the search


def test_keyboard_shortcuts(visit: Visit, complete: Explorer) -> None:
    page = visit(complete, "#image-3")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect_query(page, complete, 3)
    for place, section in enumerate(SECTIONS, start=1):
        page.keyboard.press(str(place))
        expect(page.locator(f"#view-{section}")).to_be_visible()
        expect(page.locator(f"nav [data-section={section}]")).to_have_attribute("aria-current", "page")


def test_filter_and_order_of_queries(visit: Visit) -> None:
    explorer = random_explorer(60, k=8, queries=range(20))
    page = visit(explorer)
    labels = explorer.nodes.labels
    purity = (labels[explorer.graph.neighbors] == labels[:, None]).mean(1)
    similarity = explorer.graph.similarities.mean(1)
    cards = "#queries .query"

    def order() -> list[int]:
        return [
            int(query) for query in page.locator(cards).evaluate_all("cards => cards.map(card => card.dataset.query)")
        ]

    assert order() == list(range(20))
    for by, values, sign in (
        ("purity-up", purity, 1),
        ("purity-down", purity, -1),
        ("similarity-up", similarity, 1),
        ("similarity-down", similarity, -1),
    ):
        page.locator("#order").select_option(by)
        found = order()
        assert sorted(found) == list(range(20))
        assert (np.diff(sign * values[found]) >= -1e-5).all()
    page.locator("#by-class").select_option("1")
    page.locator("#order").select_option("default")
    mine = [query for query in range(20) if labels[query] == 1]
    assert order() == mine
    expect(page.locator("#shown")).to_have_text(f"{len(mine)} of 20 queries")
    page.locator("#by-class").select_option("")
    assert order() == list(range(20))


def test_statistics(visit: Visit, complete: Explorer) -> None:
    page = visit(complete, "#statistics")
    charts = page.locator("#view-statistics svg.plot")
    labels = charts.evaluate_all("charts => charts.map(chart => chart.ariaLabel)")
    assert [label.split(":")[0].split(",")[0] for label in labels] == [
        "Purity by rank",
        "Similarity by rank",
        "Similarity",
        "Age",
    ]
    for rank, purity in enumerate(complete.statistics.summary.purity_by_rank, start=1):
        assert f"{rank}: {purity:.1%}" in labels[0]
    assert f"chance: {complete.statistics.summary.chance:.1%}" in labels[0]
    age = complete.statistics.age
    heights = charts.nth(3).evaluate(
        "chart => [...chart.querySelectorAll('.a')].map(bar => +bar.getAttribute('height'))"
    )
    np.testing.assert_allclose(np.array(heights) / max(heights), age.matching / age.matching.max(), atol=1e-6)
    for details in page.locator("#view-statistics details").all():
        details.locator("summary").click()
        assert details.locator("tbody tr").count() >= 8
    hubs = page.locator(".wide", has_text="Hubs")
    assert f"{complete.statistics.never_retrieved:.1%} of the searched images" in hubs.inner_text()
    hub = complete.statistics.hubs[1]
    hubs.locator("a").nth(1).click()
    expect_query(page, complete, hub.node)
    expect(page.locator("#view-image .facts")).to_contain_text(f"{hub.retrieved} images")
    page.go_back()
    worst = complete.statistics.purity_by_class[0].name
    page.locator(".classes a").first.click()
    expect(page.locator("#view-explore")).to_be_visible()
    headings = page.locator("#queries h3").all_text_contents()
    assert set(headings) == {worst}


def test_evolution(visit: Visit, complete: Explorer) -> None:
    page = visit(complete, "#evolution")
    card = page.locator("#evolutions .evolution").nth(2)
    columns = card.locator(".checkpoint")
    expect(columns).to_have_count(3)
    for place, moment in enumerate(complete.evolution):
        assert nodes(columns.nth(place).locator("a")) == moment.neighbors[2, :5].tolist()
        expect(columns.nth(place)).to_contain_text(f"step {moment.step:,}")
    label = page.locator("#evolution-head svg.plot").get_attribute("aria-label") or ""
    for moment in complete.evolution:
        low, high = moment.purity_interval
        assert f"Step {moment.step:,}: {moment.purity:.1%}, 95% interval {low:.1%} to {high:.1%}" in label
    expect(page.locator("#evolution-head .chart")).to_contain_text("neighbours of 500 images")
    page.locator("#depth").select_option("8")
    assert nodes(columns.nth(2).locator("a")) == complete.evolution[2].neighbors[2].tolist()
    tile = columns.nth(2).locator("a").first
    tile.focus()
    page.keyboard.press("ArrowDown")
    assert focused(page) == complete.evolution[2].neighbors[2, 1]
    page.keyboard.press("ArrowLeft")
    assert focused(page) == complete.evolution[1].neighbors[2, 1]
    node = focused(page)
    assert nodes(card.locator("a.same, .same")) == [node] * card.locator(f'.checkpoint [data-node="{node}"]').count()
    page.keyboard.press("Enter")
    expect_query(page, complete, int(node or -1))
    page.go_back()
    assert focused(page) == node


def test_bars_of_all_classes_have_one_scale(visit: Visit, complete: Explorer) -> None:
    rows = tuple(
        ClassPurity(name=name, purity=0.5, interval=(low, 0.6), images=images)
        for name, images, low in (("one", 1, 0.1), ("a class of a long name", 12_345, 0.4))
    )
    page = visit(replace(complete, statistics=replace(complete.statistics, purity_by_class=rows)), "#statistics")
    widths = "bars => bars.map(bar => [...bar.children, bar].map(part => part.getBoundingClientRect().width))"
    (filled, band, track), (other_filled, other_band, other_track) = page.locator(".classes .meter").evaluate_all(
        widths
    )
    expected = (track / 2, track / 2, track, track * 0.5, track * 0.2)
    assert (filled, other_filled, other_track, band, other_band) == pytest.approx(expected, abs=0.1)  # pixel


def test_confusion_matrix(visit: Visit, complete: Explorer) -> None:
    page = visit(complete, "#statistics")
    confusion = complete.statistics.confusion
    table = page.locator(".confusion")
    for row, counts in enumerate(confusion.counts):
        expected = [str(round(100 * count / counts.sum())) if count else "" for count in counts]
        assert table.locator("tbody tr").nth(row).locator("td").all_inner_texts() == expected
    table.locator("[data-cell]").first.focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.cell") == "0 1"
    page.keyboard.press("Enter")
    labels, neighbors = complete.nodes.labels, complete.graph.neighbors
    number = {node: int((labels[neighbors[node]] == 1).sum()) for node in np.flatnonzero(labels == 0)}
    expected = sorted((node for node in number if number[node]), key=lambda node: -number[node])
    expect(page.locator(".confused h4")).to_have_text("Images of class 0 with neighbours of class 1")
    assert nodes(page.locator(".confused a")) == expected[:24]
    page.locator("[data-cell='1 1']").click()
    expect(page.locator(".confused h4")).to_have_text("Images of class 1 with neighbours of class 1")


def test_review_lists_near_duplicates_and_outliers(visit: Visit, complete: Explorer) -> None:
    page = visit(complete, "#review")
    slider = page.get_by_role("slider")
    floor = np.floor(complete.pairs[-1][2] * 100) / 100
    for threshold in (round(complete.pairs[10][2] * 200) / 200, floor):
        slider.fill(f"{threshold:.3f}")
        shown = [pair[:2] for pair in complete.pairs if round(pair[2], 5) >= threshold]
        expect(page.locator("#pair-count")).to_have_text(f"{len(shown)} pairs")
        tiles = nodes(page.locator(".pairs a"))
        assert list(zip(tiles[::2], tiles[1::2], strict=True)) == shown[:24]
    while page.locator(".pair-list > .button").is_visible():
        page.locator(".pair-list > .button").click()
    assert len(nodes(page.locator(".pairs a"))) == 2 * len(complete.pairs)
    page.get_by_role("button", name="Select the second of each pair").click()
    second = {pair[1] for pair in complete.pairs}
    expect(page.locator("#selection-count")).to_have_text(f"{len(second)} images selected")
    assert set(nodes(page.locator("#review .hubs a"))) == {node for node, _ in complete.outliers[:24]}
    assert page.locator("#review .hubs .caption b").first.inner_text() == f"{complete.outliers[0][1]:.3f}"


def test_clusters_are_named_by_share_and_show_all_members(visit: Visit, complete: Explorer) -> None:
    mixed = replace(complete.clusters[0], classes=(("class 1", 0.11), ("class 0", 0.1)))
    explorer = replace(complete, clusters=(mixed, *complete.clusters[1:]))
    page = visit(explorer, "#clusters")
    cards = page.locator(".cluster")
    expect(cards).to_have_count(len(explorer.clusters))
    for place, cluster in enumerate(explorer.clusters):
        name, share = cluster.classes[0]
        expect(cards.nth(place).locator("h3")).to_have_text("mixed" if place == 0 else f"{name} {share:.0%}")
        expect(cards.nth(place)).to_contain_text(f"Cluster {place + 1}: {cluster.size} image")
        tiles = cards.nth(place).locator("a[data-node]")
        assert nodes(tiles)[: len(cluster.members)] == list(cluster.members)
        more = cards.nth(place).get_by_role("button", name="more of")
        if more.count():
            more.click()
        assert sorted(nodes(tiles)) == np.flatnonzero(explorer.cluster_of == place).tolist()
    expect(cards.nth(0)).to_contain_text("class 1 11%, class 0 10%")
    cards.nth(1).get_by_text("Show on the map").click()
    expect(page.locator("#color-by")).to_have_value("cluster")
    chosen = page.locator(".chip[aria-pressed=true]")
    expect(chosen).to_have_text(f"2 · {explorer.clusters[1].classes[0][0]} {explorer.clusters[1].classes[0][1]:.0%}")
    page.locator("#canvas").focus()
    page.keyboard.press("a")
    expect(page.locator("#selection-count")).to_have_text(f"{explorer.clusters[1].size} images selected")


CHIP_COLORS = """chips => chips.map(chip => {
    const context = new OffscreenCanvas(1, 1).getContext("2d");
    context.fillStyle = getComputedStyle(chip.querySelector("i")).backgroundColor;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
})"""


def oklab(colors: Any) -> np.ndarray[Any, Any]:
    """[*, 3] of sRGB colours in 0..255, by Ottosson's formulas."""
    part = np.asarray(colors) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    cones = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.68069955, 0.10739696],
        [0.08830246, 0.28171884, 0.6299787],
    ]
    axes = [
        [0.21045426, 0.79361779, -0.00407205],
        [1.9779985, -2.42859221, 0.45059371],
        [0.0259040, 0.78277177, -0.80867577],
    ]
    return np.cbrt(linear @ np.transpose(cones)) @ np.transpose(axes)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_map_colors_tell_classes_apart(visit: Visit, scheme: str) -> None:
    """22 classes: twenty colours, and two by another shape."""
    page = visit(random_explorer(200, kinds=22, with_map=True), "#map", color_scheme=scheme)
    chips = page.locator(".chip")
    expect(chips).to_have_count(22)
    colors = oklab(chips.evaluate_all(CHIP_COLORS))
    shapes = chips.locator("i").evaluate_all("dots => dots.map(dot => dot.dataset.shape)")
    assert shapes == ["circle"] * 20 + ["square"] * 2
    apart = np.linalg.norm(colors[:20, None] - colors[None, :20], axis=2) + np.eye(20)
    assert apart.min() > 0.08  # 0.02 can just be told apart
    background = {"light": [255, 255, 255], "dark": [27, 29, 31]}[scheme]
    assert np.linalg.norm(colors - oklab(background), axis=1).min() > 0.25


def test_map_is_colored_by_class_cluster_purity_or_age(visit: Visit) -> None:
    explorer = random_explorer(500, k=8, with_map=True, clusters=4)
    page = visit(explorer, "#map")
    places = map_positions(page, explorer)
    apart = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(len(places))
    seen = np.flatnonzero(apart.min(1) > 14)  # points that no other covers
    assert len(seen) > 30
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    pixels = """points => {
        const context = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
        context.drawImage(canvas, 0, 0);
        return points.map(([x, y]) => [...context.getImageData(Math.floor(x), Math.floor(y), 1, 1).data].join());
    }"""

    def colors(key: str) -> list[str]:
        page.locator("#color-by").select_option(key)
        page.evaluate(AFTER_A_FRAME)
        found: list[str] = page.evaluate(pixels, (places[seen] - [box["x"], box["y"]]).tolist())
        return found

    assert page.locator("#color-by option").all_inner_texts() == ["class", "cluster", "purity", "age of neighbours"]
    labels = explorer.nodes.labels
    purity = (labels[explorer.graph.neighbors] == labels[:, None]).mean(axis=1)
    for key, values in (("class", labels), ("cluster", explorer.cluster_of), ("purity", purity)):
        groups: dict[Any, set[str]] = {}
        for node, color in zip(seen, colors(key), strict=True):
            groups.setdefault(values[node], set()).add(color)
        assert len(groups) > 2
        assert all(len(found) == 1 for found in groups.values()), key  # the same value, the same colour
        assert len(set.union(*groups.values())) == len(groups)
    expect(page.locator(".scale")).to_have_text("0%100%")
    assert len(set(colors("age"))) > len(seen) / 2
    ages = explorer.graph.ages.mean(axis=1)
    expect(page.locator(".scale")).to_have_text(f"{ages.min().round():,.0f}{ages.max().round():,.0f}")


CLIPBOARD = """Object.defineProperty(navigator, "clipboard", {
    value: { writeText: async (text) => { window.copied = text; } },
});"""


def test_images_are_selected_in_grids_and_their_names_copied_and_saved(visit: Visit) -> None:
    names = [f"set/\u200fimage {place}\n.png" if place % 2 else f"set/<b>{place}" for place in range(40)]
    explorer = random_explorer(40, k=8, names=names)
    page = visit(explorer, script=CLIPBOARD)
    bar = page.locator("#selection")
    expect(bar).to_be_hidden()
    tiles = page.locator("#queries .query").first.locator(".neighbors a")
    tiles.nth(1).click(modifiers=["Shift"])
    tiles.nth(4).click(modifiers=["Shift"])
    chosen = neighbors_of(explorer, explorer.queries[0])[1:5]
    expect(page.locator("#selection-count")).to_have_text("4 images selected")
    expect(tiles.nth(3)).to_have_class("selected")
    expect(tiles.nth(3)).to_have_accessible_description("selected")
    tiles.nth(5).focus()
    page.keyboard.press(" ")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press(" ")
    chosen = sorted({*chosen[:3], neighbors_of(explorer, explorer.queries[0])[5]})
    expect(page.locator("#view-explore")).to_be_visible()  # nothing was opened
    expect(page.locator("#announcement")).to_have_text("4 images selected")
    page.get_by_role("button", name="Copy names").click()
    expect(page.locator("#announcement")).to_have_text("4 names copied")
    lines = [json.dumps(names[node], ensure_ascii=False) if node % 2 else names[node] for node in chosen]
    assert page.evaluate("copied") == "\n".join(lines)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save names").click()
    assert download.value.suggested_filename == "selected-images.txt"
    assert download.value.path().read_text() == "\n".join(lines) + "\n"
    page.get_by_role("button", name="Clear").click()
    expect(bar).to_be_hidden()
    page.goto(page.url.partition("#")[0] + "#image-3")
    page.get_by_role("button", name="Select", exact=True).click()
    expect(page.get_by_role("button", name="Deselect")).to_be_visible()
    expect(page.locator("#selection-count")).to_have_text("1 image selected")


def test_lasso_selects_points_of_the_map(visit: Visit, complete: Explorer) -> None:
    page = visit(complete, "#map")
    places = map_positions(page, complete)
    columns = np.sort(places[:, 0])
    gap = int(np.diff(columns)[10:-10].argmax()) + 10
    middle = (columns[gap] + columns[gap + 1]) / 2
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    corners = [(box["x"] + 3, box["y"] + 3), (middle, box["y"] + 3)]
    corners += [(x, box["y"] + box["height"] - 3) for x, _ in reversed(corners)]

    def draw() -> None:
        page.mouse.move(*corners[0])
        page.mouse.down()
        for x, y in corners[1:]:
            page.mouse.move(x, y, steps=4)
        page.mouse.up()

    page.keyboard.down("Shift")
    draw()
    page.keyboard.up("Shift")
    expect(page.locator("#selection-count")).to_have_text(f"{gap + 1} images selected")
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="class 1").click()
    page.get_by_role("button", name="Lasso").click()
    draw()  # selects shown points only
    inside = np.flatnonzero((places[:, 0] < middle) & (complete.nodes.labels == 1))
    expect(page.locator("#selection-count")).to_have_text(f"{len(inside)} images selected")
    page.goto(page.url.partition("#")[0] + f"#image-{inside[0]}")
    expect(page.get_by_role("button", name="Deselect")).to_be_visible()


def map_positions(page: Page, explorer: Explorer) -> np.ndarray[Any, Any]:
    """[M, 2] positions in pixels of the window while the map is not zoomed."""
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    x, y = explorer.map.positions.T.astype(float)
    scale = min((box["width"] - 72) / np.ptp(x), (box["height"] - 72) / np.ptp(y))
    across = box["x"] + box["width"] / 2 + (x - (x.min() + x.max()) / 2) * scale
    down = box["y"] + box["height"] / 2 - (y - (y.min() + y.max()) / 2) * scale
    return np.stack([across, down], 1)


def test_map_by_pointer(visit: Visit) -> None:
    explorer = random_explorer(800, k=8, with_map=True)
    page = visit(explorer, "#map")
    canvas = page.locator("#canvas")
    places = map_positions(page, explorer)
    apart = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(len(places))
    node = int(apart.min(1).argmax())  # the one with the most room around it
    x, y = places[node].round().tolist()
    page.mouse.move(x, y)
    expect(canvas).to_have_attribute("data-node", str(node))
    expect(page.locator("#map-card")).to_contain_text(explorer.classes[explorer.nodes.labels[node]])
    assert page.locator("#map-card img").count() == 1
    expect(canvas).to_have_attribute("data-pictures", "0")
    for _ in range(6):
        page.mouse.wheel(0, -120)
    expect(canvas).not_to_have_attribute("data-pictures", "0")  # points have become pictures
    page.mouse.move(x + 1, y)  # the point under the pointer has not moved
    expect(canvas).to_have_attribute("data-node", str(node))
    page.mouse.down()
    page.mouse.move(x + 60, y + 40, steps=4)
    page.mouse.up()
    expect(page.locator("#view-map")).to_be_visible()  # dragged, not clicked
    page.mouse.move(x + 60, y + 40)
    expect(canvas).to_have_attribute("data-node", str(node))
    page.mouse.click(x + 60, y + 40)
    expect_query(page, explorer, node)
    page.get_by_text("Show on the map").click()
    expect(canvas).to_have_attribute("data-zoom", "4.00")
    page.get_by_role("button", name="Show all").click()
    expect(canvas).to_have_attribute("data-zoom", "1.00")
    page.get_by_role("button", name="class 1").click()
    other = next(place for place, label in enumerate(explorer.nodes.labels) if label == 1)
    page.mouse.move(*places[other].tolist())
    hovered = int(canvas.get_attribute("data-node") or page.wait_for_function("canvas.dataset.node").json_value())
    assert explorer.nodes.labels[hovered] == 1


# The focused point of the map, after the next frame.
AFTER_A_FRAME = """new Promise((done) =>
    requestAnimationFrame(() => requestAnimationFrame(() => done(canvas.dataset.node))))"""


def test_map_by_keyboard(visit: Visit, complete: Explorer) -> None:
    page = visit(complete, "#map")
    canvas = page.locator("#canvas")
    places = map_positions(page, complete)
    canvas.focus()
    walked = []
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "ArrowLeft"):
        page.keyboard.press(key)
        page.wait_for_function("before => canvas.dataset.node && canvas.dataset.node !== before", arg=str(walked[-1:]))
        walked.append(int(page.evaluate(AFTER_A_FRAME)))
    assert places[walked[1], 0] > places[walked[0], 0]
    assert places[walked[2], 1] < places[walked[1], 1]
    assert places[walked[3], 0] < places[walked[2], 0]
    expect(page.locator("#announcement")).to_contain_text(f"image {complete.nodes.ids[walked[3]]:,}")
    page.keyboard.press("Enter")
    expect_query(page, complete, walked[3])
    page.go_back()
    canvas.focus()
    page.keyboard.press("+")
    expect(canvas).to_have_attribute("data-zoom", "1.50")
    page.keyboard.press("0")
    expect(canvas).to_have_attribute("data-zoom", "1.00")


def test_two_fingers_zoom_map(visit: Visit, complete: Explorer) -> None:
    page = visit(complete, "#map", has_touch=True, viewport={"width": 390, "height": 800})
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touch = page.context.new_cdp_session(page)
    for kind, apart in (("touchStart", 40), ("touchMove", 80), ("touchMove", 160), ("touchEnd", None)):
        points = [] if apart is None else [{"x": x - apart / 2, "y": y, "id": 0}, {"x": x + apart / 2, "y": y, "id": 1}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_function("canvas.dataset.zoom > 3 && canvas.dataset.zoom < 5")
    expect(page.locator("#view-map")).to_be_visible()


def hostile_explorer() -> Explorer:
    rng = np.random.default_rng(0)
    count = 3 * len(HOSTILE)
    embeddings = rng.normal(size=(count, 6)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return make_explorer(
        embeddings,
        np.arange(count) % len(HOSTILE),
        classes=HOSTILE,
        names=[HOSTILE[(3 * place) % len(HOSTILE)] for place in range(count)],
        queries=range(len(HOSTILE)),
        evolution=[embeddings, embeddings],
        clusters=3,
        with_map=True,
        run=HOSTILE[0].replace("/", ""),
    )


def test_hostile_names_and_classes_are_shown_as_text(visit: Visit) -> None:
    page = visit(hostile_explorer(), script="window.alert = () => { throw new Error('a name was executed'); }")
    elements = page.evaluate(
        "document.querySelectorAll('script, iframe, object, svg:not([class]):not([viewBox])').length"
    )
    for section in SECTIONS:
        page.goto(page.url.partition("#")[0] + f"#{section}")
        expect(page.locator(f"#view-{section}")).to_be_visible()
    for node, name in enumerate(HOSTILE):
        page.goto(page.url.partition("#")[0] + f"#image-{node}")
        heading = page.locator("#view-image h2").text_content() or ""
        assert heading.startswith(name.replace("\u202e", "�").replace("\0", "�").replace("\ud800", "�")[:50])
        assert page.locator("#view-image h2 bdi").count() == 1
    page.keyboard.press("/")
    page.keyboard.type("onerror")
    assert page.locator("#results a").count() > 0
    assert page.locator("img:not([src^='data:'])").count() == 0
    assert page.evaluate("document.querySelectorAll('script, iframe, object').length") <= elements
    assert page.evaluate("window.broken") is None


CONTRASTS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    // Any CSS colour over another one, mixed by the browser.
    const over = (color, below) => {
        canvas.globalCompositeOperation = "copy";
        canvas.fillStyle = `rgb(${below})`;
        canvas.fillRect(0, 0, 1, 1);
        canvas.globalCompositeOperation = "source-over";
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    };
    const behind = (element) => {
        const layers = [];
        for (let at = element; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
        return layers.reduce((below, color) => over(color, below), [255, 255, 255]);
    };
    const light = (color) => {
        const [r, g, b] = color.map((part) => part / 255).map((part) =>
            part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratio = (one, two) => (Math.max(light(one), light(two)) + 0.05) / (Math.min(light(one), light(two)) + 0.05);
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        const style = getComputedStyle(element);
        const box = element.getBoundingClientRect();
        if (!element.checkVisibility({ visibilityProperty: true }) || !box.width) continue;
        const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        const drawn = element.closest("svg");
        const below = behind(drawn ? drawn : element);
        let color = null;
        if (drawn && element.matches(".mark path")) color = style.stroke;
        else if (drawn && text && element.matches("text")) color = style.fill;
        else if (!drawn && text) color = style.color;
        if (element.matches("input[placeholder]")) color = getComputedStyle(element, "::placeholder").color;
        const name = `${element.tagName}.${element.className?.baseVal ?? element.className}`;
        if (color) found.push([ratio(over(color, below), below), `${name} ${color} on ${below}`]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(visit: Visit, complete: Explorer, scheme: str) -> None:
    page = visit(complete, color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(247, 246, 243)", "dark": "rgb(18, 19, 20)"}[scheme]
    for place in (*SECTIONS, "image-45"):
        page.goto(page.url.partition("#")[0] + f"#{place}")
        if place == "map":
            page.locator(".chip").first.click()
            page.locator("#canvas").focus()
            page.keyboard.press("ArrowRight")
        if place == "image-45":
            page.keyboard.press("/")
            page.keyboard.type("class")
            page.get_by_text("Names and numbers").click(force=True)
        found = page.evaluate(CONTRASTS)
        assert len(found) > 20
        assert [problem for ratio, problem in found if ratio < 4.5] == []
    page.keyboard.press("Escape")
    page.locator("#help").click()
    assert [problem for ratio, problem in page.evaluate(CONTRASTS) if ratio < 4.5] == []


@pytest.mark.parametrize("hostile", [False, True])
def test_phone_needs_no_horizontal_scrolling(visit: Visit, complete: Explorer, hostile: bool) -> None:
    explorer = hostile_explorer() if hostile else complete
    page = visit(explorer, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    for place in (*SECTIONS, "image-5"):
        page.goto(page.url.partition("#")[0] + f"#{place}")
        for width in (360, 700):
            page.set_viewport_size({"width": width, "height": 740})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, place
    page.set_viewport_size({"width": 360, "height": 740})
    tile = neighbor_tiles(page).nth(1)
    node = nodes(neighbor_tiles(page))[1]
    tile.tap()
    expect_query_by_url(page, node)


def expect_query_by_url(page: Page, node: int) -> None:
    expect(page).to_have_url(re.compile(rf"#image-{node}$"))


def test_theme_can_be_switched_and_is_remembered(visit: Visit, complete: Explorer) -> None:
    page = visit(complete)
    background = "getComputedStyle(document.body).backgroundColor"
    button = page.locator("#theme")
    button.click()
    assert page.evaluate(background) == "rgb(18, 19, 20)"
    expect(button).to_have_attribute("aria-label", "Theme: dark")
    page.reload()
    assert page.evaluate(background) == "rgb(18, 19, 20)"
    page.emulate_media(color_scheme="dark")
    button.click()
    expect(button).to_have_attribute("aria-label", "Theme: system")
    button.click()
    assert page.evaluate(background) == "rgb(247, 246, 243)"


def test_page_works_without_local_storage(visit: Visit, complete: Explorer) -> None:
    script = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    page = visit(complete, script=script)
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 19, 20)"
    page.locator("#queries .neighbors a").first.click()
    expect_query(page, complete, neighbors_of(complete, complete.queries[0])[0])


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_motion_follows_preference(visit: Visit, complete: Explorer, motion: str) -> None:
    script = """window.moved = 0;
        const start = Document.prototype.startViewTransition;
        Document.prototype.startViewTransition = function (...given) {
            window.moved += 1;
            return start.apply(this, given);
        };"""
    page = visit(complete, script=script, reduced_motion=motion)
    transition = page.locator(".frame").first.evaluate("frame => getComputedStyle(frame).transitionDuration")
    page.locator("#queries .neighbors a").nth(1).click()
    expect_query(page, complete, neighbors_of(complete, complete.queries[0])[1])
    still = motion == "reduce"
    assert page.evaluate("moved") == (0 if still else 1)
    assert transition == ("0s" if still else "0.12s")
    page.keyboard.press("Enter")  # keys never animate
    expect_query(page, complete, neighbors_of(complete, neighbors_of(complete, complete.queries[0])[1])[0])
    assert page.evaluate("moved") == (0 if still else 1)


def test_print_shows_the_grid(visit: Visit, complete: Explorer) -> None:
    page = visit(complete, "#statistics", color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    expect(page.locator("#view-explore")).to_be_visible()
    for hidden in ("#view-statistics", ".bar", ".toolbar"):
        expect(page.locator(hidden).first).to_be_hidden()
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(28, 27, 26)"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"count": 30, "kinds": 0, "with_evolution": True}, id="no labels"),
        pytest.param({"count": 30, "queries": [4]}, id="one query"),
        pytest.param({"count": 1}, id="one image"),
        pytest.param({"count": 1, "kinds": 0}, id="one image without a label"),
        pytest.param({"count": 300, "kinds": 1000, "k": 50, "aged": False}, id="1,000 classes and 50 neighbours"),
        pytest.param({"count": 30, "k": 200}, id="more neighbours than images"),
    ],
)
def test_unusual_pages(visit: Visit, options: dict[str, Any]) -> None:
    explorer = random_explorer(**{"with_map": True, "clusters": 1, **options})
    page = visit(explorer)
    for link in page.locator("nav[aria-label=Sections] a").all():
        link.click()
        section = link.get_attribute("data-section")
        expect(page.locator(f"#view-{section}")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.goto(page.url.partition("#")[0] + "#image-0")
    expect_query(page, explorer, 0)
    if explorer.classes is None:
        assert "match" not in page.locator("body").inner_text()
    if not neighbors_of(explorer, 0):
        expect(page.locator("#view-image")).to_contain_text("There are no other images to retrieve")
    page.locator("#queries").evaluate("queries => queries.scrollIntoView()")
    grid = page.evaluate("document.querySelectorAll('#queries .neighbors a').length")
    assert grid == sum(min(20, len(neighbors_of(explorer, query))) for query in explorer.queries)


def test_everything_has_an_accessible_name(visit: Visit, complete: Explorer) -> None:
    page = visit(complete)
    for place in (*SECTIONS, "image-5"):
        page.goto(page.url.partition("#")[0] + f"#{place}")
        nameless = page.evaluate("""() =>
            [...document.querySelectorAll("a, button, input, select, svg[role], [role=region], canvas")]
            .filter((element) => element.checkVisibility())
            .filter((element) => !(element.ariaLabel || element.textContent.trim() || element.labels?.length))
            .map((element) => element.outerHTML.slice(0, 200))""")
        assert nameless == []
        assert page.locator("img:not([alt])").count() == 0
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
        assert len(ids) == len(set(ids))
