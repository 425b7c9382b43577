"""A parser for the HTML pages under test."""

import html.parser

VOID = {"meta", "img", "input", "path", "line", "circle", "br"}


class HtmlPage(html.parser.HTMLParser):
    """Collects tags, attributes and text, and asserts that tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.page = page
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}  # text directly inside each kind of tag
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
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]

    @property
    def words(self) -> str:
        """The visible text, with single spaces."""
        parts = (text for tag, texts in self.texts.items() if tag not in ("script", "style") for text in texts)
        return " ".join(" ".join(parts).split())
