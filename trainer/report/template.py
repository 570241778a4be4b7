"""Pages of one file: a template of this folder with its style, its program and its data inside, and no request.

Text reaches a page in two ways, both escaped: by jinja2 into the HTML, and as JSON in a script element, from which the
page's program takes it as text (textContent), never as HTML. A content security policy lets only that program run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote_from_bytes

import jinja2
from markupsafe import Markup

HERE = Path(__file__).parent


def rendered(template: str, *, styles: Sequence[str], programs: Sequence[str], data: object, **values: object) -> str:
    """The page that `template` makes of `values`.

    styles, programs  files of this folder, which follow each other in the page's style and in its one program
    data              what the program reads from the element with the id "data"
    """
    program = "".join((HERE / name).read_text(encoding="utf-8") for name in programs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent}
    return environment.get_template(template).render(
        style=Markup("".join((HERE / name).read_text(encoding="utf-8") for name in styles)),
        program=Markup(program),
        program_hash=base64.b64encode(hashlib.sha256(program.encode()).digest()).decode(),
        data=in_script(data),
        **values,
    )


def in_script(values: object) -> Markup:
    """JSON that no text in it can leave: it is ASCII, and <, > and & are escaped."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def number(value: float) -> str:
    """1,234 and 0.0123 and 5.25 as a person reads them."""
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share in [0, 1] as 0.4 % or 71 %, never as 0 % or 100 % where it is not that; no line ends before the sign."""
    if 0 < share < 0.0005:
        text = "under 0.1"
    elif 0.995 <= share < 1:
        text = "over 99"
    else:
        text = f"{100 * share:.1f}" if 0 < share < 0.1 else f"{100 * share:.0f}"
    return f"{text}\N{NO-BREAK SPACE}%"


def link_to(path: Path, page_folder: Path) -> str:
    """A link from a page in `page_folder` to `path`, percent-encoded, for as long as both stay where they are."""
    return quote_from_bytes(os.fsencode(os.path.relpath(path, page_folder)))
