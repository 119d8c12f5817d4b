"""Draw charts with matplotlib, as a PNG or as an SVG inside an HTML page.

The same figure always gives the same bytes. In a page the text of an SVG is text, and its colours follow the light or
dark style of the page. Its elements have no id, since ids of two charts could collide, and no `style`, since a content
security policy may forbid it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO, StringIO
from typing import Any
from xml.etree import ElementTree

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("charts need one more package: pip install 'tah[report]'") from error

COLOURS = {  # an HTML page defines CSS variables of these names: --ink, ...
    "ink": "#1b1d21",
    "soft": "#5d6068",
    "line": "#dedbd3",
    "amber": "#d97706",
    "blue": "#2158c4",
    "violet": "#7a3fc0",
    "teal": "#08786a",
    "crimson": "#be1647",
}
VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tah",
    "text.parse_math": False,  # a token may contain dollar signs
    "path.simplify": False,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "legend.frameon": False,
    "legend.fontsize": "small",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), COLOURS["soft"]),
}
POINT = 72  # points per inch; the unit of an SVG


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style of all charts, as a context around drawing and saving, or as a decorator."""
    with matplotlib.rc_context(STYLE):
        yield


def new_chart(width: float = 6.4, height: float = 3.9) -> tuple[Figure, Axes]:
    """Return a new figure with the given width and height in inches, and its axes."""
    figure = Figure(figsize=(width, height), dpi=POINT, layout="constrained")
    return figure, figure.subplots()


def as_png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file with 144 dots per inch."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=2 * POINT)
    return content.getvalue()


def as_svg(figure: Figure, label: str) -> str:
    """Return a figure as an `<svg>` element for an HTML page.

    Args:
        figure: Figure to draw. The `gid` of an artist becomes the class of its element.
        label: Description for screen readers.
    """
    content = StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the page has more fonts
        figure.savefig(content, format="svg", transparent=True)
    root = ElementTree.fromstring(content.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        element.text = element.text if element.tag == "text" else None
    markers = {f"#{path.get('id')}": path for path in root.findall(".//defs/path")}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "defs"):
                parent.remove(child)
            elif child.tag == "use":  # a marker, copied to its place, since a reference needs an id
                marker = markers[child.get("{http://www.w3.org/1999/xlink}href", "")]
                child.tag = "path"
                child.set("d", marker.get("d", ""))
                child.set("style", f"{child.get('style', '')};{marker.get('style', '')}")
                child.set("transform", f"translate({child.attrib.pop('x')} {child.attrib.pop('y')})")
            child.attrib = _presented(child.attrib)
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": label}
    return ElementTree.tostring(root, "unicode", short_empty_elements=False)


def _presented(given: Mapping[str, str]) -> dict[str, str]:
    """Return the attributes of an element: style properties as attributes, without the ids that matplotlib numbers."""
    found = {name: given[name] for name in ("d", "x", "y", "transform") if name in given}
    for entry in given.get("style", "").split(";"):
        name, _, value = (part.strip() for part in entry.partition(":"))
        if name and name != "font-family":  # the page has fonts of its own
            found[name] = VARIABLES.get(value, value)
    own_name = given.get("id", "")
    if own_name and not own_name.rpartition("_")[2].isdigit():
        found["class"] = own_name
    return found
