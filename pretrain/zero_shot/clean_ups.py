"""What a template may do to the text of a field, by name: the only code behind a task's YAML file."""

from __future__ import annotations

import re
from collections.abc import Callable

BLANK = "_"


def before_blank(text: str) -> str:
    """What stands before the first `_`."""
    return _around_blank(text)[0]


def after_blank(text: str) -> str:
    """What stands behind the first `_`."""
    return _around_blank(text)[1]


def _around_blank(text: str) -> tuple[str, str]:
    before, blank, after = text.partition(BLANK)
    if not blank:
        raise ValueError(f"{text!r} has no blank ({BLANK})")
    return before, after


def without_letter(text: str) -> str:
    """An option without the `A.` in front of it: two characters, whatever they are, as the harness does it."""
    return text[2:]


def spaced_stops(text: str) -> str:
    """A space behind every full stop, none around the text."""
    return text.replace(".", ". ").strip()


_SPACED = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"))
_BRACKETS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_LAST = (
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0"), (" \n", "\n"), ("\n ", "\n")),
    *((" N ", " 1 "), (" 's", "'s")),
)


def wikitext(text: str) -> str:
    """WikiText's tokens as running text, replacement by replacement as the harness does it."""
    text = text.replace("s '", "s'")
    for old, new in _SPACED:
        text = text.replace(old, new)
    for pattern, new in _BRACKETS:
        text = re.sub(pattern, new, text)
    for old, new in _LAST:
        text = text.replace(old, new)
    return text


CLEAN_UPS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lstrip": str.lstrip,
    "before_blank": before_blank,
    "after_blank": after_blank,
    "without_letter": without_letter,
    "spaced_stops": spaced_stops,
    "wikitext": wikitext,
}
"""Name in a template -> what it does."""
