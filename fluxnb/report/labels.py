"""Words at the points and lines of a chart, where there is room, never on each other; what a point says when asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

CONTRAST = 4.5  # of words on white, WCAG AA
# Where words may stand beside their point, from the best place on: offset in points, and which side of them is there.
_SIDES = ((6, 4, "left"), (6, -11, "left"), (-6, 4, "right"), (-6, -11, "right"), (0, 8, "center"), (0, -15, "center"))
_FAR = tuple((2.2 * x, 2.4 * y, side) for x, y, side in _SIDES)


def ink(colour: str) -> str:
    """A colour dark enough for words on white: the same hue."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    while 1.05 / (0.05 + _luminance(rgb)) < CONTRAST:
        rgb = [0.93 * v for v in rgb]
    return "#" + "".join(f"{round(255 * v):02x}" for v in rgb)


def _luminance(rgb: Sequence[float]) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def write(axes, words: Iterable[tuple], taken: Sequence = (), points: Sequence[tuple] = ()) -> list[str]:
    """Writes words at points where there is room, in this order of importance; those that have been written.

    Args:
        words: (text, [(x, y), …] of which any will do, keyword arguments of its text) each.
        taken: texts that are there already.
        points: (x, y) that words don't cover.
    """
    from matplotlib.transforms import Bbox

    renderer, frame = axes.figure.canvas.get_renderer(), axes.get_window_extent()
    full = [text.get_window_extent(renderer) for text in taken]
    marks = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in (axes.transData.transform(p) for p in points)]
    written, scale = [], axes.figure.dpi / 72
    for text, places, look in words:
        note = axes.annotate(text, places[0], textcoords="offset points", xytext=(0, 0), **look)
        own, start = note.get_window_extent(renderer), axes.transData.transform(places[0])[1]  # once: it is slow
        for p, (dx, dy, side) in ((p, s) for sides in (_SIDES, _FAR) for p in places for s in sides):
            x, y = axes.transData.transform(p)
            left = x + dx * scale - own.width * {"left": 0, "center": 0.5, "right": 1}[side]
            box = Bbox.from_bounds(left, y + dy * scale + own.y0 - start, own.width, own.height)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not box.count_overlaps(full) and not box.count_overlaps(marks):
                note.xy, note.xyann = p, (dx, dy)
                note.set_ha(side)
                full.append(box)
                written.append(text)
                break
        else:
            note.remove()
    return written


def tell(axes, xs: Sequence[float], ys: Sequence[float], said: Iterable[str]) -> None:
    """What the points of a chart say under a pointer or the keyboard's focus; see `fluxnb.report.html.figure_html`."""
    figure = axes.figure
    figure.told = [*getattr(figure, "told", []), *((axes, x, y, s) for x, y, s in zip(xs, ys, said, strict=True))]


def told(figure) -> list[tuple[float, float, str]]:
    """(left, top, what it says) of each point, in percent of the figure as it is saved, cut to what is drawn."""
    if not getattr(figure, "told", None):
        return []
    import matplotlib as mpl

    box, dpi = figure.get_tightbbox(figure.canvas.get_renderer()), figure.dpi
    box = box.padded(mpl.rcParams["savefig.pad_inches"])
    places = [(axes.transData.transform((x, y)) / dpi, said) for axes, x, y, said in figure.told]
    return [(100 * (x - box.x0) / box.width, 100 * (box.y1 - y) / box.height, said) for (x, y), said in places]
