"""A matplotlib figure as SVG: small, with text as text, and with colours that follow the page's theme.

One picture serves the light and the dark page: the colours that lab.report.style names become CSS variables.
`inline` is for the page, which defines the variables and holds the styles of all pictures once; `alone` is
for a file, which brings both along.

An artist whose gid begins with "class " becomes an element of those CSS classes, so that the page can show
and hide it.
"""

import io
import re
import xml.etree.ElementTree as ET
from html import escape

from matplotlib.backends.backend_svg import FigureCanvasSVG

from lab.report import style

CLASS = "class "
FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif'
HIDDEN = ".s{display:none}.k0{display:inline}"  # in a file of its own: of lines to choose from, the first
LINK = "{http://www.w3.org/1999/xlink}href"
NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
DIGITS = re.compile(r"(\d+\.\d\d)\d+")
REFERENCE = re.compile(r"#([\w-]+)")
SHORT_FONT = re.compile(r"font:(?:[a-z-]+ )*(?:(\d+) )?([\d.]+px)[^;]*")  # of matplotlib before 3.11
DROPPED = re.compile(r"(?:^|;)(?:font-family|stroke-linejoin):[^;]*")  # the page says them once


def draw(canvas):
    """The picture as an element tree. Call it inside rc_context(style.rc())."""
    text = io.StringIO()
    FigureCanvasSVG(canvas).print_svg(text, metadata={"Date": None, "Creator": None, "Format": None})
    return ET.fromstring(NO_XML.sub("?", text.getvalue()))


def inline(root, prefix, label, styles):
    """The picture as an element of an HTML page.

    prefix: of its ids, unique on the page. label: alt text. styles: {CSS: class}, which grows; the page
    defines them by `rules`.
    """
    size = f'viewBox="{root.get("viewBox")}" role="img" aria-label="{escape(label)}"'
    return f'<svg class="plot" {size}>{_content(root, prefix, styles)}</svg>'


def alone(root, title, description):
    """The picture as a file; its background and ink follow the theme of the page that shows it."""
    box, styles = root.get("viewBox"), {}
    width, height = (1.5 * float(size) for size in box.split()[2:])
    content = _content(root, "x", styles)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{width:.0f}" height="{height:.0f}" '
        f'role="img"><title>{escape(title)}</title><desc>{escape(description)}</desc>'
        f"<style>{style.css()}text{{font-family:{FONT}}}{HIDDEN}{rules(styles)}</style>"
        f'<rect width="100%" height="100%" fill="var(--p-page)"/>{content}</svg>\n'
    )


def rules(styles):
    """The CSS that defines the classes of `styles`."""
    return "".join(f".{name}{{{css}}}" for css, name in styles.items())


def _content(root, prefix, styles):
    used = {name for e in root.iter() for v in e.attrib.values() for name in REFERENCE.findall(v)}
    # In their order in the picture: matplotlib's ids are new each time.
    ids = dict.fromkeys(e.get("id") for e in root.iter() if e.get("id") in used)
    names = {name: f"{prefix}-{i}" for i, name in enumerate(ids)}
    return "".join(_element(e, names, styles) for e in root)


def _element(e, names, styles):
    """An element with all that is in it as text; "" for what shows nothing."""
    tag = e.tag.partition("}")[2]
    if tag in ("metadata", "style") or (tag == "path" and e.get("style") == "fill: none"):
        return ""
    attributes = "".join(f' {name}="{escape(value)}"' for name, value in _attributes(e, names, styles))
    inside = "".join(_element(child, names, styles) for child in e)
    inside += escape(e.text, quote=False) if e.text and e.text.strip() else ""
    if tag in ("g", "defs") and not (inside and attributes):
        return inside and (inside if tag == "g" else f"<defs>{inside}</defs>")
    return f"<{tag}{attributes}>{inside}</{tag}>" if inside else f"<{tag}{attributes}/>"


def _attributes(e, names, styles):
    for key, value in e.attrib.items():
        if key == "id":
            if value.startswith(CLASS):
                yield "class", value.removeprefix(CLASS)
            elif value in names:
                yield key, names[value]
        elif key == "style":
            css = style.themed(value.replace("; ", ";").replace(": ", ":"))
            css = SHORT_FONT.sub(lambda m: f"font-size:{m[2]}" + f";font-weight:{m[1]}" * bool(m[1]), css)
            css = DROPPED.sub("", css).strip(";")
            css = REFERENCE.sub(lambda m: "#" + names.get(m[1], m[1]), css)
            if css:
                yield "class", styles.setdefault(css, f"p{len(styles)}")
        elif not value.startswith("rotate(-0 "):
            value = REFERENCE.sub(lambda m: "#" + names.get(m[1], m[1]), value)
            yield ("href" if key == LINK else key), DIGITS.sub(r"\1", " ".join(value.split()))
