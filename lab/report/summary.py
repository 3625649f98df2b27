"""The summary of a report as Markdown, for a code host: the verdict, the first sections, the models."""

from lab.report.page import Picture
from lab.report.tables import grid_markdown, markdown, markdown_rows


def summary(views, title):
    """Markdown with the verdict, the sections that say most and the models' lines of every run."""
    out = [
        f"# {markdown(title)}",
        "",
        "Drawn by `lab report` from records.jsonl. It also writes index.html, the full page: every op, the "
        "tables behind the pictures, the sources side by side.",
        "",
    ]
    for view in views:
        out += _of_run(view, several=len(views) > 1)
    return "\n".join(out).rstrip() + "\n"


def pictures(view):
    """The pictures that the summary shows; the others are on the page only."""
    shown = [view.headline] * bool(view.headline) + [s for part in view.top + view.models for s in part.shown]
    return [one for one in shown if isinstance(one, Picture)]


def _of_run(view, several):
    run, deeper = view.run, "#" * several
    out = [f"## Run {markdown(run.id)}: {markdown(run.about)}", ""] if several else []
    out += _notices(n for n in run.notices if n.level == "first")
    out += ["", *(line for sentence in view.verdict for line in (markdown(sentence), ""))]
    out += _shown(view.headline) if view.headline else []
    for part in view.top + view.models:
        if part.shown:
            out += [f"##{deeper} {markdown(part.title)}", ""]
        if part.cards:
            heads, *rows = zip(*part.cards)
            out += [*markdown_rows(heads, rows), ""]
        for one in part.shown:
            out += _shown(one)
    out += [f"##{deeper} What was run, on what", "", *markdown_rows(["", ""], view.facts), ""]
    return [*out, *_notices(n for n in run.notices if n.level != "first"), ""]


def _notices(notices):
    return [line for n in notices for line in (f"> **{n.label}**: {markdown(n.text)}", ">")]


def _shown(one):
    if isinstance(one, Picture):
        figure, lines = one.figure, [f"![{markdown(one.figure.alt)}]({one.file})"]
    else:
        figure, lines = one, grid_markdown(one)
    said = [line for text in (figure.reading, figure.conditions) if text for line in (markdown(text), "")]
    return [f"**{markdown(figure.title)}**", "", *lines, "", *said, f"`{_code(figure.command)}`", ""]


def _code(text):
    return " ".join(str(text).replace("`", "'").split())
