"""Values, tables and grids as HTML and as Markdown.

Not in the template, which takes much longer for a cell. Tables are most of the page's bytes, so they leave
out the end tags that HTML does not need, and name the columns of numbers once for a table.
"""

import json
import math
import re
from html import escape

import pandas as pd
from markupsafe import Markup

from lab.report import style
from lab.report.figures import amount

ROWS = 1000  # of a table on the page: a browser takes seconds for ten thousand
COLUMNS = 24  # of a table, as far as the page's style aligns numbers
HASH = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24,56}\b")


def brief(text):
    """Text with long hashes cut to eight digits."""
    return HASH.sub(r"\1", str(text))


def cell(value):
    """A value of a table as text: thousands separated, four significant digits, a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str):
        return brief(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if math.isinf(value):
            return str(value)
        if value == int(value):
            return f"{int(value):,}"
        digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:,.{min(digits, 6)}f}"
    if isinstance(value, (dict, list)):
        return json.dumps(value, default=str)
    return str(value)


def duration(us):
    """123.456 -> "123 us", 1234.5 -> "1.23 ms", 1.64e6 -> "1.64 s"."""
    divisor, name = (1e6, "s") if us >= 1e6 else (1e3, "ms") if us >= 1e3 else (1.0, "us")
    value = us / divisor
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {name}"


def frame(table, caption, label):
    """The first ROWS rows of a table as HTML."""
    if len(table) > ROWS:
        caption = f"{caption} (the first {ROWS:,} of {len(table):,} rows; all of them are in records.jsonl)"
    right = [f"n{i}" for i, kind in enumerate(table.dtypes, 1) if pd.api.types.is_numeric_dtype(kind)]
    sides = ["sides"] if len(table.columns) and not table.columns[0] else []
    heads = "".join(f"<th>{escape(str(name))}" for name in table.columns)
    body = []
    for row in table.head(ROWS).itertuples(index=False, name=None):
        texts = [escape(cell(value)) for value in row]
        body.append("<tr>" + "".join(f"<td{_long(text)}>{text}" for text in texts))
    return Markup(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="{" ".join(right + sides)}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{heads}</thead>"
        "<tbody>\n" + "\n".join(body) + "\n</tbody></table></div>\n"
    )


def _long(text):
    return " class=long" if len(text) > 50 else ""


def alignment():
    """The CSS by which `frame` sets columns of numbers to the right."""
    columns = ",".join(f".n{i} :is(td,th):nth-child({i})" for i in range(1, COLUMNS))
    return columns + "{text-align:right}"


def grid(found):
    """A lab.report.figures.Grid as HTML: a table for each group of its rows."""
    tables = []
    for group in dict.fromkeys(group for group, _, _ in found.rows):
        heads = "".join(f"<th>{amount(batch)}" for batch in found.batches)
        body = "".join(
            f"<tr><th>{escape(case)}{''.join(map(_grid_cell, cells))}"
            for of_group, case, cells in found.rows
            if of_group == group
        )
        label = escape(f"{found.title}: {group}")
        tables.append(
            f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
            f'<table class="grid"><thead><tr><th>{escape(group)}, batch{heads}</thead><tbody>{body}</tbody>'
            "</table></div>"
        )
    return Markup(f'<div class="groups">{"".join(tables)}</div>')


def _grid_cell(found):
    if found is None:
        return "<td>–"
    note = f"<small>{escape(found.note)}</small>" if found.note else ""
    if not found.backend:
        return f"<td class=even>{escape(found.words)}{note}"
    color = style.backend(found.backend).color
    return f'<td style="--c:{color};--s:{100 * found.strength:.0f}%">{escape(found.words)}{note}'


def markdown(text):
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", escape(" ".join(brief(text).split()), quote=False))


def markdown_rows(heads, rows):
    """A Markdown table as lines."""
    lines = [[markdown(value) for value in row] for row in (heads, *rows)]
    lines.insert(1, ["---"] * len(heads))
    return [f"| {' | '.join(line)} |" for line in lines]


def grid_markdown(found):
    """A Grid as lines of Markdown."""
    rows = [
        [case, *("–" if c is None else f"{c.words} ({c.note})" if c.note else c.words for c in cells)]
        for _, case, cells in found.rows
    ]
    return markdown_rows(["batch", *map(amount, found.batches)], rows)
