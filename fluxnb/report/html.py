"""What notebooks show besides text: figures, image grids, tables, callouts and the provenance strip.

Each function comes twice: `figure(…)` displays in a notebook, `figure_html(…)` returns the HTML. All of it is
self-contained (images are data URIs) and styled by the report's own style sheet; in a live notebook it reads
as plain tables and figures. Metrics must be computed before, on raw pixels: images are re-encoded here.
"""

import base64
import html
import io
import math
import re
from collections.abc import Callable, Sequence
from datetime import datetime

from fluxnb.report import labels

CALLOUTS = {
    "result": "Result",
    "note": "Note",
    "not-measured": "Not measured",
    "warning": "Careful",
}
LONG = 40  # characters of a table cell that is given room
NAME = 30  # characters of a row's name that is given room
FEW = 7  # columns of a table that fits a screen with its words
LOSSLESS_PX = 160  # up to this side images are shown pixel by pixel, where lossy WebP would be visible
SVG_LIMIT = 400_000  # bytes; a chart with very many marks is smaller, and faster to draw, as pixels


def figure(fig, alt: str, caption: str | None = None) -> None:
    """Display a matplotlib figure. See figure_html."""
    _show(figure_html(fig, alt, caption))


def image_grid(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence], **options) -> None:
    """Display a table of images. See image_grid_html for the options."""
    _show(image_grid_html(rows, columns, cells, **options))


def table(frame, caption: str, formats: dict | None = None, units: dict | None = None) -> None:
    """Display a data frame as a table. See table_html."""
    _show(table_html(frame, caption, formats, units))


def callout(text: str, kind: str = "result") -> None:
    """Display the one-sentence result of a notebook, or a note. See callout_html.

    The first result of a notebook is its page's finding, which the indexes show too.
    """
    found = {"fluxnb": {"finding": plain(text)}} if kind == "result" else None
    _show(callout_html(text, kind), found)


def svg(fig) -> bytes:
    """A matplotlib figure as SVG: the same figure is the same bytes, so a committed report changes for cause."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "fluxnb", "svg.fonttype": "path"}):
        fig.savefig(buffer, format="svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
    return buffer.getvalue()


def figure_html(fig, alt: str, caption: str | None = None) -> str:
    """A matplotlib figure as <figure>, drawn as an SVG data URI (WebP where SVG is large); closes it.

    The points that `fluxnb.report.labels.tell` was told of answer to a pointer and to the keyboard.

    alt says in words what the chart shows; ValueError if it is empty. Its card is white in dark mode too,
    because a chart's colours are chosen against white.
    """
    alt, points = _required(alt, "alt"), labels.told(fig)
    drawn = svg(fig)
    width = _svg_width(drawn)
    uri = "data:image/svg+xml;base64," + base64.b64encode(drawn).decode()
    if len(drawn) > SVG_LIMIT:
        uri = _as_pixels(fig)
    import matplotlib.pyplot as plt

    plt.close(fig)  # or the inline backend shows it again, without a description
    shown = f'<img src="{uri}" alt="{_attribute(alt)}"{width}>'
    if points:
        asked = "".join(
            f'<span class="fx-point" role="img" tabindex="0" data-at="{x:.2f} {y:.2f}" '
            f'aria-label="{_attribute(said)}"></span>'
            for x, y, said in points
        )
        shown = f'<div class="fx-chart">{shown}{asked}</div>'
    return _figure(shown, caption, "fx-figure")


def image_grid_html(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence],
    *,
    caption: str | None = None,
    corner: str = "",
    width: int | None = None,
    max_px: int = 512,
) -> str:
    """Images in a table with row and column headers, a caption under each.

    rows, columns  labels, e.g. prompts and thresholds; HTML is escaped
    cells          cells[r][c] is (image, caption) or (image, caption, alt); a str says why there is no image;
                   None leaves the cell empty. image: PIL image or uint8 array HxWx3. Without alt, the labels
                   and the caption make the alt text.
    corner         what rows and columns are, e.g. "prompt \\ threshold"
    width          displayed width in CSS pixels, the image's own by default
    max_px         longer sides are scaled down to this many pixels for display

    Raises ValueError if the shape of cells doesn't match the labels.
    """
    if len(cells) != len(rows) or any(len(row) != len(columns) for row in cells):
        raise ValueError(f"image_grid needs {len(rows)} rows of {len(columns)} cells, one for each label")
    head = "".join(f'<th scope="col">{_escape(c)}</th>' for c in columns)
    body = ""
    for label, row in zip(rows, cells, strict=True):
        shown = (_grid_cell(cell, f"{label}, {c}", width, max_px) for c, cell in zip(columns, row, strict=True))
        body += f'<tr><th scope="row">{_escape(label)}</th>{"".join(shown)}</tr>\n'
    first = f'<th scope="col">{_escape(corner)}</th>' if corner else "<td></td>"
    grid = f'<table class="fx-images"><thead><tr>{first}{head}</tr></thead>\n<tbody>{body}</tbody></table>'
    return _figure(_scrolling(grid, caption or "Images"), caption, "fx-grid")


def table_html(frame, caption: str, formats: dict | None = None, units: dict | None = None) -> str:
    """A pandas data frame as an accessible table: numbers right-aligned, three significant figures.

    formats  column -> format specification such as ".1%" or a function of the value, instead of 3 figures
    units    column -> unit, shown in the header after the name; frame.attrs["units"] by default
    The index becomes the row headers; an unnamed 0..n-1 index isn't shown, then the first column does.
    Missing values are an en dash. ValueError if formats or units name a column that isn't there.
    """
    formats, units = formats or {}, units or frame.attrs.get("units", {})
    unknown = sorted({*formats, *units} - set(frame.columns))
    if unknown:
        raise ValueError(f"table: no column {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, frame))}")
    plain_index = frame.index.name is None and list(frame.index) == list(range(len(frame)))
    shown = frame if plain_index else frame.reset_index()
    columns = list(shown.columns)
    numeric = {c: all(_is_number(v) or _is_missing(v) for v in shown[c]) for c in columns}
    long = "fx-long" if len(columns) > FEW else "fx-words"  # few columns leave room for words on the screen
    head = ""
    for column in columns:
        unit = f' <span class="fx-unit">({_escape(units[column])})</span>' if column in units else ""
        kind = _number_class(numeric[column])
        if len(str(column)) > NAME:
            kind = f' class="{"fx-number " * numeric[column]}fx-name"'
        head += f'<th scope="col"{kind}>{_escape(column)}{unit}</th>'
    body = ""
    for values in shown.itertuples(index=False, name=None):
        body += "<tr>"
        for position, (column, value) in enumerate(zip(columns, values, strict=True)):
            tag, scope = ("th", ' scope="row"') if position == 0 else ("td", "")
            text = _escape(_formatted(value, formats.get(column)))
            room, words = (LONG, long) if position else (NAME, "fx-name")
            kind = _number_class(numeric[column]) or (f' class="{words}"' if len(text) > room else "")
            body += f"<{tag}{scope}{kind}>{text}</{tag}>"
        body += "</tr>\n"
    caption = _required(caption, "caption")
    markup = (
        f'<table class="fx-table"><caption><span>{inline(caption)}</span></caption><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table>"
    )
    return _scrolling(markup, caption)


def callout_html(text: str, kind: str = "result") -> str:
    """A sentence set apart: "result" (the finding), "note", "not-measured" or "warning".

    Several lines are a list; `code` and **bold** are understood, all else is escaped. ValueError for another kind.
    """
    if kind not in CALLOUTS:
        raise ValueError(f"callout: no kind {kind!r}; choose from {', '.join(CALLOUTS)}")
    return (
        f'<div class="fx-callout fx-{kind}" role="note"><p class="fx-label">{CALLOUTS[kind]}</p>'
        f"{lines_html(inline(_required(text, 'text')))}</div>"
    )


def lines_html(markup: str) -> str:
    """A paragraph, or a list of what stands in lines of its own."""
    lines = markup.splitlines()
    return f"<p>{markup}</p>" if len(lines) < 2 else f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"


def provenance_html(run: dict, n: int | None = None) -> str:
    """Hardware, commit, versions, date and number of rows as a <dl>; what `run` doesn't say is left out.

    run  the content of run.json, i.e. telemetry.provenance(params) and what the runner added
    n    number of measured rows
    """
    items = [(name, value) for name, value in _provenance_items(run, n) if value]
    if not items:
        return ""
    inner = "".join(f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in items)
    return f'<dl class="fx-provenance">{inner}</dl>'


def three_figures(value: float) -> str:
    """A number to three significant figures: 0.0123, 1.20, 45.7, 1230, 4.56×10⁻⁷; integers stay whole."""
    value = float(value)
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa}×10{power}".replace("-", "−")
    rounded = float(f"{value:.3g}")  # first, so that 9.999 becomes 10.0 and not 10.00
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{decimals}f}".replace("-", "−")


def webp_uri(image, max_px: int = 512, lossy: int | None = None) -> tuple[str, tuple[int, int]]:
    """An image as a WebP data URI, and its (width, height): lossless up to 160 px, else quality 90; or as `lossy`."""
    from PIL import Image

    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture = picture.convert("RGB")
    if max(picture.size) > max_px:
        picture.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(picture.size) <= LOSSLESS_PX and not lossy:
        picture.save(buffer, "WEBP", lossless=True, quality=90, method=4)
    else:
        picture.save(buffer, "WEBP", quality=lossy or 90, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), picture.size


def inline(text: str) -> str:
    """Escape, then turn `code` and **bold** into markup."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", _escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def plain(text: str) -> str:
    """The same without its marks."""
    return re.sub(r"`([^`]+)`|\*\*([^*]+)\*\*", lambda m: m[1] or m[2], text).strip()


def _show(markup: str, metadata: dict | None = None) -> None:
    from IPython.display import HTML, display

    display(HTML(markup), metadata=metadata)


def _figure(inner: str, caption: str | None, kind: str) -> str:
    below = f"<figcaption>{inline(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}">{inner}{below}</figure>'


def _scrolling(inner: str, label: str) -> str:
    """A wide table scrolls by itself, and can be focused to be scrolled with the keyboard."""
    plain = re.sub(r"[`*]", "", label)
    return f'<div class="fx-scroll" role="region" tabindex="0" aria-label="{_attribute(plain)}">{inner}</div>'


def _grid_cell(cell, where: str, width: int | None, max_px: int) -> str:
    if cell is None:
        return "<td></td>"
    if isinstance(cell, str):
        return f'<td class="fx-absent">{_escape(cell)}</td>'
    image, caption, *rest = cell
    alt = _required(rest[0], "alt") if rest else ": ".join(filter(None, [where, caption]))
    uri, (w, h) = webp_uri(image, max_px)
    shown = width or w
    size = f'width="{shown}" height="{round(shown * h / w)}"'
    below = f'<span class="fx-under">{inline(caption)}</span>' if caption else ""
    return f'<td><img src="{uri}" alt="{_attribute(alt)}" {size}>{below}</td>'


def _as_pixels(fig) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=200, bbox_inches="tight", facecolor="white")
    uri = io.BytesIO()
    Image.open(buffer).convert("RGB").save(uri, "WEBP", lossless=True, quality=90, method=4)
    return "data:image/webp;base64," + base64.b64encode(uri.getvalue()).decode()


def _svg_width(svg: bytes) -> str:
    """The chart's natural size as attributes, so that a page doesn't move while it is drawn."""
    tag = svg[svg.find(b"<svg") :].split(b">")[0].decode()
    sizes = [size for side in ("width", "height") for size in re.findall(rf'\s{side}="([\d.]+)pt"', tag)[:1]]
    if len(sizes) < 2:
        return ""
    width, height = (round(float(size) * 4 / 3) for size in sizes)
    return f' width="{width}" height="{height}"'


def _formatted(value, how: str | Callable | None) -> str:
    if _is_missing(value):
        return "–"
    if callable(how):
        return str(how(value))
    if how is not None:
        return format(value, how).replace("-", "−") if _is_number(value) else str(value)
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return "yes" if value else "no"
    if _is_number(value):
        return str(int(value)) if _is_whole_type(value) else three_figures(value)
    return str(value)


def _is_number(value) -> bool:
    import numbers

    return isinstance(value, numbers.Number) and not isinstance(value, bool)


def _is_whole_type(value) -> bool:
    import numbers

    return isinstance(value, numbers.Integral)


def _is_missing(value) -> bool:
    return value is None or type(value).__name__ in ("NAType", "NaTType") or (_is_number(value) and value != value)


def _number_class(numeric: bool) -> str:
    return ' class="fx-number"' if numeric else ""


def _required(text: str, name: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} must say something: it is what a reader without the picture gets")
    return text.strip()


def _escape(text) -> str:
    return html.escape(str(text), quote=False)


def _attribute(text: str) -> str:
    return html.escape(re.sub(r"\s+", " ", text), quote=True)


def _provenance_items(run: dict, n: int | None) -> list[tuple[str, str | None]]:
    """The names and texts of the strip, from the fields that telemetry.provenance writes."""
    machine = run.get("machine") or {}
    gpus = [gpu["name"] for gpu in machine.get("gpus") or []]
    counts = {name: gpus.count(name) for name in gpus}
    versions = run.get("versions") or {}
    shown = ("python", "torch", "diffusers")
    commit, started, rows = run.get("commit"), _date_text(run.get("started_at")), run.get("measured") or {}
    made = "Page made anew" if run.get("replayed") else "Page made" if rows else "Date"
    dates = [
        ("Measured", _dates_text(rows.get("from"), rows.get("to"))),
        ("Commits of the rows", ", ".join(rows.get("commits", [])) or ("not noted" if rows else None)),
        (made, started),
    ]
    return [
        (
            "GPU",
            ", ".join(f"{n} × {name}" if n > 1 else name for name, n in counts.items())
            or ("none" if machine else None),
        ),
        ("CPU", _cpu_text(machine)),
        ("CUDA_VISIBLE_DEVICES", (run.get("environment") or {}).get("CUDA_VISIBLE_DEVICES")),
        ("CUDA", machine.get("cuda")),
        ("Driver", machine.get("driver")),
        ("Versions", ", ".join(f"{name} {versions[name]}" for name in shown if versions.get(name))),
        (
            "Commit of the page" if run.get("replayed") or rows else "Commit",
            commit and commit[:10] + (" + uncommitted changes" if run.get("dirty") else ""),
        ),
        *dates,
        ("Measured rows", None if n is None else str(n)),
    ]


def _cpu_text(machine: dict) -> str:
    cores, ram = machine.get("cores"), machine.get("ram_gib")
    parts = [machine.get("cpu"), f"{cores} cores" if cores else None, f"{ram} GiB" if ram else None]
    return ", ".join(filter(None, parts))


def _dates_text(first: str | None, last: str | None) -> str | None:
    """From when to when; one moment once."""
    return " to ".join(dict.fromkeys(filter(None, map(_date_text, (first, last))))) or None


def _date_text(moment: str | None) -> str | None:
    return datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M %Z") if moment else None
