"""The frame of a page that needs nothing but itself: style, theme, and a policy that lets no other script run.

Templates lie in `assets/` and escape what they are given. A name that a user chose is set apart (`bdi` in a template,
`isolated` elsewhere), so that one written from right to left leaves the number beside it in its place.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

ASSETS = Path(__file__).parent / "assets"


def page(title: str, template: str, *, styles: Sequence[str] = (), **content: Any) -> str:
    """The whole HTML: `template` of assets/ as its body, `styles` of assets/ after page.css. The title is escaped."""
    from markupsafe import Markup

    css = Markup("\n".join(_asset(name) for name in ("page.css", *styles)))
    script = Markup(_asset("page.js"))
    policy = f"default-src 'none'; style-src '{_hash(css)}'; script-src '{_hash(script)}'; base-uri 'none'"
    body = render(template, **content)
    return render("page.html", title=title, body=body, css=css, script=script, policy=policy)


def render(template: str, **content: Any) -> Markup:
    """A template of assets/ with its content escaped; a name that the content lacks raises jinja2.UndefinedError."""
    from markupsafe import Markup

    return Markup(_environment().get_template(template).render(**content))


def clip(text: str, most: int) -> str:
    """The text, or its beginning with the number of characters left out."""
    return text if len(text) <= most else f"{text[:most]}\u2026 ({len(text) - most:,} more characters)"


def isolated(name: str) -> str:
    """For titles, sentences and pictures, where no element can: Unicode's first strong isolate around the name.

    A name in ASCII stays as it is: it runs from left to right, as the page does.
    """
    return name if name.isascii() else f"\u2068{name}\u2069"


def shell(*words: str) -> Markup:
    """A command line as a shell takes it; each word is set apart by an element, for a mark would be copied with it."""
    from markupsafe import Markup

    return Markup(" ").join(Markup("<bdi>{}</bdi>").format(shlex.quote(word)) for word in words)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["bdi"] = _apart
    made.filters["isolated"] = isolated
    made.filters["clip"] = clip
    return made


def _apart(name: str) -> Markup:
    """A name in an element of its own; "3 NAME", a stage with its number, begins with the number in any script."""
    from markupsafe import Markup

    return Markup("<bdi{}>{}</bdi>").format(Markup(' dir="ltr"') if str(name)[:1].isdigit() else "", name)


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """How a content policy names the one inline block that may take effect."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
