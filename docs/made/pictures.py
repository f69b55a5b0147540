"""The pictures of the architecture: boxes and arrows as SVG within the page, in its own colours, light and dark.

A picture is drawn in a space 480 wide, so that its words can be read on a phone.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

WIDTH = 480
_LINE = 17  # of text, in height


@dataclass(frozen=True)
class Box:
    """A box around its middle; the first line is its name."""

    x: int
    y: int
    lines: tuple[str, ...]
    width: int = 150
    kind: str = "box"  # box, store, or outside: of somebody else

    @property
    def height(self) -> int:
        return 16 + _LINE * len(self.lines)

    def svg(self) -> str:
        left, top = self.x - self.width // 2, self.y - self.height // 2
        round_ = 14 if self.kind == "store" else 4
        size = f'width="{self.width}" height="{self.height}"'
        out = f'<rect class="{self.kind}" x="{left}" y="{top}" {size} rx="{round_}"/>'
        for number, line in enumerate(self.lines):
            y = top + 8 + _LINE * number + 13
            out += f'<text class="{"name" if number == 0 else "more"}" x="{self.x}" y="{y}">{escape(line)}</text>'
        return out


@dataclass(frozen=True)
class Arrow:
    """A line through points; the head is at its end. `both`: at its beginning as well."""

    points: tuple[tuple[int, int], ...]
    label: str = ""
    at: tuple[int, int] | None = None  # the label's middle; none: the middle of the first stretch
    both: bool = False

    def svg(self) -> str:
        path = " ".join(f"{'M' if number == 0 else 'L'}{x},{y}" for number, (x, y) in enumerate(self.points))
        start = ' marker-start="url(#head)"' if self.both else ""
        out = f'<path class="arrow" d="{path}" marker-end="url(#head)"{start}/>'
        if self.label:
            (x1, y1), (x2, y2) = self.points[:2]
            x, y = self.at or ((x1 + x2) // 2, (y1 + y2) // 2)
            out += "".join(
                f'<text class="label" x="{x}" y="{y + 4 + 14 * number}">{escape(line)}</text>'
                for number, line in enumerate(self.label.split("\n"))
            )
        return out


def draw(name: str) -> str:
    """The picture as one block of HTML.

    Raises:
        KeyError: no such picture.
    """
    title, height, parts = PICTURES[name]
    inner = "".join(part.svg() for part in parts)
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto-start-reverse"><path class="head" d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    )
    return (
        f'<svg class="picture" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{head}{inner}</svg>"
    )


_LEFT, _RIGHT = 110, 370
_WAY: tuple[Box | Arrow, ...] = (
    Box(_LEFT, 40, ("source", "JSONL, CSV, Parquet ..."), 190, "outside"),
    Box(_LEFT, 130, ("shards", "data/NAME"), 190, "store"),
    Box(_LEFT, 220, ("batch", "media decoded here"), 190),
    Box(_LEFT, 310, ("model", "loss, ZeRO workers"), 190),
    Box(_LEFT, 400, ("checkpoint", "runs/NAME/checkpoints"), 190, "store"),
    Box(_RIGHT, 400, ("bundle", "runs/NAME/bundle"), 190, "store"),
    Box(_RIGHT, 310, ("channel", "channels/NAME.jsonl"), 190, "store"),
    Box(_RIGHT, 220, ("replica", "Ray Serve"), 190),
    Box(_RIGHT, 130, ("answer", "with an id"), 190, "outside"),
    Box(_RIGHT, 40, ("feedback", "feedback/segments"), 190, "store"),
    Arrow(((_LEFT, 65), (_LEFT, 105)), "prepare", (_LEFT + 42, 85)),
    Arrow(((_LEFT, 155), (_LEFT, 195)), "Ray Data", (_LEFT + 42, 175)),
    Arrow(((_LEFT, 245), (_LEFT, 285)), "train", (_LEFT + 42, 265)),
    Arrow(((_LEFT, 335), (_LEFT, 375))),
    Arrow(((205, 400), (275, 400)), "export", (238, 388)),
    Arrow(((_RIGHT, 375), (_RIGHT, 335)), "promote", (_RIGHT + 42, 355)),
    Arrow(((_RIGHT, 285), (_RIGHT, 245)), "serve.start", (_RIGHT + 46, 265)),
    Arrow(((_RIGHT, 195), (_RIGHT, 155)), "HTTP", (_RIGHT + 42, 175)),
    Arrow(((_RIGHT, 105), (_RIGHT, 65)), "/v1/feedback", (_RIGHT + 50, 85)),
    Arrow(((275, 40), (240, 40), (240, 130), (205, 130)), "refine", (240, 28)),
)
_ROOMS: tuple[Box | Arrow, ...] = (
    Box(90, 50, ("jobs/", "commands; Ray Data,", "Train, Tune, DeepSpeed"), 170),
    Box(390, 50, ("serve/", "Ray Serve, FastAPI,", "the page"), 170),
    Box(240, 165, ("mmagent/", "PyTorch, Transformers,", "Arrow; no Ray"), 180),
    Box(240, 290, ("storage root", "shards, bundles, channels, feedback"), 270, "store"),
    Arrow(((90, 84), (90, 165), (150, 165)), "imports", (90, 125)),
    Arrow(((390, 84), (390, 165), (330, 165)), "imports", (390, 125)),
    Arrow(((175, 50), (305, 50)), "HTTP: admin", (240, 38)),
    Arrow(((40, 84), (40, 290), (105, 290)), "reads, writes", (58, 240), both=True),
    Arrow(((440, 84), (440, 290), (375, 290)), "reads, writes", (424, 240), both=True),
)
_REACH: tuple[Box | Arrow, ...] = (
    Box(95, 40, ("users", "a key: ask, feedback"), 170, "outside"),
    Box(385, 40, ("operators", "Ray's token, admin key"), 170, "outside"),
    Box(95, 150, ("service", "port 8000, TLS"), 170),
    Box(385, 150, ("head", "6379, 8265, 10001"), 170),
    Box(95, 260, ("replicas", "reached by service only"), 170),
    Box(385, 260, ("workers", "no port for users"), 170),
    Box(95, 375, ("outside", "tools, media hosts,", "webhook: as listed"), 170, "outside"),
    Box(385, 375, ("storage root", "Redis, where several", "nodes serve"), 170, "store"),
    Arrow(((95, 65), (95, 125)), "API key", (130, 95)),
    Arrow(((385, 65), (385, 125)), "token", (412, 95)),
    Arrow(((300, 55), (180, 130)), "/admin, /metrics", (240, 78)),
    Arrow(((95, 175), (95, 235))),
    Arrow(((300, 160), (180, 245)), "deploys", (212, 200)),
    Arrow(((385, 175), (385, 235)), "token", (412, 205), both=True),
    Arrow(((95, 285), (95, 341))),
    Arrow(((180, 270), (300, 360)), "", None, both=True),
    Arrow(((385, 285), (385, 341)), "", None, both=True),
)
PICTURES: dict[str, tuple[str, int, tuple[Box | Arrow, ...]]] = {
    "way": ("The way of the data: from a source to an answer, and by feedback back", 435, _WAY),
    "rooms": ("The rooms of the project and who imports whom", 325, _ROOMS),
    "reach": ("Who reaches what on a cluster", 415, _REACH),
}
