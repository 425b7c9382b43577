"""The page of neighbours in Chromium: pointer, keyboard, layout, accessibility and hostile names."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from explorers import make_explorer, random_explorer
from playwright.sync_api import Locator, Page, expect

from msf_faiss.neighbors.page_content import Explorer

pytestmark = pytest.mark.browser

Visit = Callable[..., Page]

SECTIONS = ("explore", "statistics", "evolution", "clusters", "map")
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
    for rank, purity in enumerate(complete.statistics.purity_by_rank, start=1):
        assert f"{rank}: {purity:.1%}" in labels[0]
    assert f"chance: {complete.statistics.chance:.1%}" in labels[0]
    age = complete.statistics.age
    heights = charts.nth(3).evaluate(
        "chart => [...chart.querySelectorAll('.a')].map(bar => +bar.getAttribute('height'))"
    )
    np.testing.assert_allclose(np.array(heights) / max(heights), age.matching / age.matching.max(), atol=1e-6)
    for details in page.locator("#view-statistics details").all():
        details.locator("summary").click()
        assert details.locator("tbody tr").count() >= 8
    assert f"{complete.statistics.never_retrieved:.1%} of the searched images" in page.locator(".wide").inner_text()
    hub = complete.statistics.hubs[1]
    page.locator(".hubs a").nth(1).click()
    expect_query(page, complete, hub.node)
    expect(page.locator("#view-image .facts")).to_contain_text(f"{hub.retrieved} images")
    page.go_back()
    worst = complete.statistics.purity_by_class[0][0]
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


def test_clusters(visit: Visit, complete: Explorer) -> None:
    page = visit(complete, "#clusters")
    cards = page.locator(".cluster")
    expect(cards).to_have_count(len(complete.clusters))
    for place, cluster in enumerate(complete.clusters):
        assert nodes(cards.nth(place).locator("a")) == list(cluster.members)
        expect(cards.nth(place)).to_contain_text(f"{cluster.size} image")
        expect(cards.nth(place)).to_contain_text(f"{cluster.share:.0%} of this class")
    cards.nth(1).locator("a").nth(2).click()
    expect_query(page, complete, complete.clusters[1].members[2])


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
