"""Text for a terminal: columns as wide as their contents, and control characters escaped."""

import unicodedata

from lab.errors import printable


def for_terminal(text):
    """`text` with control characters, except line breaks and tabs, as escapes (\\x1b)."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode()
        for c in text
    )


def columns(rows, right=(), indent=""):
    """The lines of a table. Each column is as wide as its longest cell; two spaces separate columns.

    rows: sequences of cells, converted by str; a row may lack its last cells. right: the indices of the
    columns that are aligned to the right.
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
