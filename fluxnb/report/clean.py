"""What a cell displays as HTML or Markdown, made fit to be published: nothing in it runs or loads anything."""

from __future__ import annotations

import re

TAGS = (
    "a abbr b blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 "
    "hr i img ins kbd li mark ol p pre q s samp small span strong sub summary sup table tbody td tfoot th thead tr u ul"
).split()
_PLAIN = (
    "alt aria-hidden aria-label class colspan data-at data-case height id open role rowspan scope tabindex title width"
)
ATTRIBUTES = [*_PLAIN.split(), "href", "src"]
_LINK = r"(?:https?://|#|(?:[\w.-]+/)*[\w.-]+\.html)[^\"<>\s]*"
_IMAGE = r"data:image/(?:png|webp|jpeg|gif|svg\+xml);base64,[\w+/=\s]*"
# As fluxnb.report.html writes it: one way to read it, and nothing but these. What else there is, a parser cleans.
_CLEAN = re.compile(
    rf"(?:[^<]++|</(?:{'|'.join(TAGS)})>|<(?:{'|'.join(TAGS)})(?:\s+(?:(?:{'|'.join(_PLAIN.split())})(?:=\"[^\"<>]*+\")?"
    rf"|href=\"{_LINK}\"|src=\"{_IMAGE}\"))*+\s*/?>)*+"
)
_WITH_CONTENT = re.compile(r"<(script|style|template|noscript)\b.*?(</\1\s*>|\Z)", re.IGNORECASE | re.DOTALL)


def clean(markup: str) -> str:
    """HTML with these tags and attributes only; scripts and style sheets go with what is in them."""
    if _CLEAN.fullmatch(markup):
        return markup
    import bleach

    def allowed(tag: str, name: str, value: str) -> bool:
        if name in ("href", "src"):
            return bool(re.fullmatch(_IMAGE if name == "src" else _LINK, value.strip()))
        return name in ATTRIBUTES

    rest = _WITH_CONTENT.sub("", markup)
    return bleach.clean(rest, tags=TAGS, attributes=allowed, protocols={"data", "http", "https"}, strip=True)
