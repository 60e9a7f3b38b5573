"""The promise of every page: it loads nothing from elsewhere, describes every image and is small enough."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from fluxnb.errors import UserError

MAX_PAGE_MB = 15.0
# Attributes that make a browser fetch something. <a href> doesn't: it is the reader's own step.
LOADING = {
    "img": ("src", "srcset"),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
    "script": ("src",),
    "link": ("href",),
    "iframe": ("src",),
    "frame": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "track": ("src",),
    "input": ("src",),
    "base": ("href",),
    "body": ("background",),
}
CSS_LOAD = re.compile(r"""url\(\s*['"]?([^'")]*)|@import\s+['"]([^'"]+)""", re.IGNORECASE)


def check_page(text: str, name: str, max_mb: float = MAX_PAGE_MB) -> None:
    """UserError unless a page is small enough, describes every image, and loads nothing from elsewhere."""
    size = len(text.encode()) / 1e6
    if size > max_mb:
        raise UserError(
            f"The report {name} is {size:.1f} MB, more than the {max_mb:g} MB allowed; "
            "show fewer or smaller images in it."
        )
    audit = _Audit()
    audit.feed(text)
    audit.close()
    if audit.undescribed:
        raise UserError(
            f"The report {name} has an image without alt text in {audit.undescribed[0]}; show figures with "
            "fluxnb.report.html.figure(fig, alt=…), which asks for one."
        )
    if audit.loads:
        where, what = audit.loads[0]
        raise UserError(
            f"The report {name} would load {what[:120]!r} in {where}; a report has to stand alone, "
            "so embed it as a data URI."
        )


class _Audit(HTMLParser):
    """Collects images without a description and everything a page would load, each with its place."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.undescribed: list[str] = []
        self.loads: list[tuple[str, str]] = []
        self._where = "the page's frame"
        self._in_style = False

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        if "data-cell" in values:
            self._where = f"cell {values['data-cell']}"
        if tag == "img" and not values.get("alt", "").strip():
            self.undescribed.append(self._where)
        for name in LOADING.get(tag, ()):
            self._load(values.get(name, ""))
        if tag == "meta" and values.get("http-equiv", "").lower() == "refresh":
            self._load(values.get("content", ""))
        self._css(values.get("style", ""))
        self._in_style = tag == "style"

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self._in_style = False

    def handle_endtag(self, tag):
        if tag == "style":
            self._in_style = False

    def handle_data(self, data):
        if self._in_style:
            self._css(data)

    def _css(self, text: str) -> None:
        for match in CSS_LOAD.finditer(text):
            self._load(match.group(1) or match.group(2) or "")

    def _load(self, target: str) -> None:
        target = target.strip()
        if target and not target.startswith(("data:", "#", "about:blank")):
            self.loads.append((self._where, target))
