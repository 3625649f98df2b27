"""The CUDA and the Triton file of an op, or of a ladder, as the template shows them side by side."""

import textwrap

from markupsafe import Markup

from lab.errors import LabError
from lab.report import drawings, style, twins


def twin_view(op):
    """The CUDA and the Triton file of an op as HTML, step by step; {"missing": text} where a file is
    absent."""

    def view():
        cuda, triton = twins.pair(op)
        rows = twins.rows(cuda, triton)
        return side_by_side(cuda, triton, rows, f"The twins side by side: {len(rows)} steps")

    return _or_missing(view)


def ladder_view(name):
    """The two files of a ladder as HTML, rung by rung; {"missing": text} where a file is absent."""
    return _or_missing(lambda: side_by_side(*twins.ladder(name), f"The rungs of {name} side by side"))


def _or_missing(view):
    try:
        return view()
    except LabError as e:
        return {"missing": str(e).replace(str(twins.ROOT) + "/", "")}


def side_by_side(cuda, triton, rows, title):
    """Rows of lab.report.twins as the template shows them."""

    def side(file, step, missing):
        return {
            "label": style.backend(file.language).label,
            "missing": missing,
            "chunks": _chunks(file, step.chunks if step else []),
        }

    return {
        "title": title,
        "sides": [
            {
                "label": style.backend(h.language).label,
                "name": h.name,
                "header": h.header,
                "lines": h.count,
                "around": _chunks(h, h.around),
            }
            for h in (cuda, triton)
        ],
        "steps": [
            {
                "title": row.title,
                "intro": row.intro,
                "drawing": Markup(drawings.DRAWINGS[row.drawing]().inline) if row.drawing else "",
                "sides": list(map(side, (cuda, triton), row.steps, row.missing)),
            }
            for row in rows
        ],
    }


def _chunks(file, chunks):
    return [
        {
            "first": c.first,
            "last": c.first + len(c.lines) - 1,
            "kernel": c.kernel,
            "text": c.text,
            "below": c.below,
            "html": twins.highlight(file.language, textwrap.dedent(c.code)),
        }
        for c in chunks
        if c.lines or c.text
    ]
