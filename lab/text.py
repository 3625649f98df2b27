"""Text for a terminal: columns that are as wide as what stands in them; what a terminal is spared."""

import unicodedata

from lab.errors import printable


def for_terminal(text):
    """`text` without what steers a terminal: control characters but for line breaks and tabs become escapes
    (\\x1b)."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode()
        for c in text
    )


def columns(rows, right=(), indent=""):
    """Lines of a table: each column as wide as its longest cell, two spaces between, no spaces at a line's
    end.

    rows: sequences of cells, turned into text by str; a shorter row leaves the last columns empty. right: the
    numbers, from 0, of the columns whose cells end at one place.
    """
    rows = [[printable(str(cell)) for cell in row] for row in rows]  # cells may come from a file
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    return [
        (
            indent
            + "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            )
        ).rstrip()
        for row in rows
    ]
