"""Code blocks of docs/ and the images that they use."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(
    r"(?:^[ ]*<!--(?P<remark>(?:(?!-->).)*)-->\n)?"
    r"^(?P<indent>[ ]*)(?P<ticks>```+|~~~+)(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=indent)(?P=ticks)[ ]*$",
    flags=re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced code block of a page."""

    page: str  # path below docs/
    line: int  # of the opening fence
    language: str  # "" if none is given
    title: str | None
    text: str
    not_run: str | None  # the reason, from the comment before the block

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    """Return the blocks of all pages, in order."""
    return [block for path in sorted(DOCS.rglob("*.md")) for block in blocks_of(path)]


def blocks_of(path: Path) -> list[Block]:
    """Return the blocks of a page, in order."""
    text = path.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        indent, info = fence["indent"], fence["info"]
        title = re.search(r'title="(.*?)"', info)
        reason = re.fullmatch(r"\s*not run: (.+?)\s*", fence["remark"] or "", flags=re.DOTALL)
        found.append(
            Block(
                page=path.relative_to(DOCS).as_posix(),
                line=text.count("\n", 0, fence.start("ticks")) + 1,
                language=(info.split() or [""])[0],
                title=title and title[1],
                text="".join(line.removeprefix(indent) for line in fence["text"].splitlines(keepends=True)),
                not_run=reason and reason[1],
            )
        )
    return found


def commands(block: Block) -> list[str]:
    """Return the commands of a shell block, one per line; a backslash continues a line."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def draw_photos(folder: Path, images: int, seed: int) -> None:
    """Write random JPEGs of two classes."""
    rng = np.random.default_rng(seed)
    for i in range(images):
        place = folder / ("cats", "dogs")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(place / f"{i}.jpg")
