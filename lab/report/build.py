"""`lab report DIR`: pictures, one self-contained index.html and a README.md from the records below
DIR."""

import sys
from pathlib import Path

from lab.errors import LabError, shown
from lab.files import is_there, read_text, write_whole

# Of one page: a run takes seconds to draw, one of 3,400 rows most of a minute, and a browser has to hold
# all pictures.
RUNS, ROWS = 6, 5000
DRAWN = ".drawn-by-lab-report"  # what the last report wrote into figures/, so that the next can clear it away


def add_arguments(parser):
    parser.add_argument("dir", metavar="DIR", help="a folder with records.jsonl, in itself or in subfolders")
    parser.add_argument(
        "--out", metavar="DIR", help="where to write index.html, README.md and figures/ (default: DIR)"
    )
    parser.add_argument(
        "--run",
        metavar="ID",
        help=f"draw only this run (default: the newest {RUNS}, or fewer with more than {ROWS:,} rows)",
    )


def main(args):
    return report(args.dir, args.out, args.run)


def report(folder, out=None, only=None):
    """Writes the report and prints where it is. Returns 0; raises LabError (exit status 2) for unusable
    input.

    folder: of the records. out: where to write; default: there.
    only: the id of the run to draw; default: all.
    """
    from lab.report import load, page, summary

    source = Path(folder)
    stored = load.find(source)
    if only:
        ids = [r.id for r in stored]
        stored = [r for r in stored if r.id == only]
        if not stored:
            raise LabError(f"no run {only!r} in {source}: it has {', '.join(ids)}")
    count = how_many(stored)
    runs, older = [r.run() for r in stored[:count]], [r.id for r in stored[count:]]
    del stored  # of 100,000 records, which each collection of garbage would walk through
    if older:
        runs[0].notices.append(
            load.Notice(
                "note",
                f"{len(older)} older runs are not drawn: `lab report DIR --run ID` draws one of them "
                f"({', '.join(shown(name, quotes=False) for name in older[:20])}"
                + (", and others)." if len(older) > 20 else ")."),
            )
        )
    if out:
        out = Path(out)
    else:
        out = source if source.is_dir() else source.parent
    if out.exists() and not out.is_dir():
        raise LabError(f"--out {out}: is a file; name a folder")

    count = 0
    taken, views = set(), []
    for i, run in enumerate(runs):
        slug = page.slug_of(run.id, taken)
        folder = "figures" if len(runs) == 1 else f"figures/{slug}"

        def progress(name):
            nonlocal count
            count += 1
            if sys.stderr.isatty():
                print(f"\r\x1b[Kdrawing {count}: {name}", end="", file=sys.stderr, flush=True)

        views.append(page.view(run, slug, folder, i == 0, progress))
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    devices = list(dict.fromkeys(r.device for r in runs))
    title = "Decode kernels on " + (devices[0] if len(devices) == 1 else f"{len(devices)} machines")
    if all(r.emulated for r in runs):
        title += " (emulated)"
    files = {p.file: p.svg for v in views for p in summary.pictures(v)}
    files |= {
        "README.md": summary.summary(views, title).encode(),
        "index.html": page.html(views, title).encode(),
    }
    write(out, files)
    warnings = sum(n.level != "note" for r in runs for n in r.notices)
    pictures = sum(len(v.pictures) for v in views)
    print(
        f"{out / 'index.html'}: {pictures} pictures of {len(runs)} run{'s' * (len(runs) > 1)}"
        + (f", {warnings} warning{'s' * (warnings > 1)} on the page" if warnings else "")
    )
    return 0


def how_many(stored):
    """How many of the runs, newest first, fit on one page; at least the newest."""
    count = rows = 0
    for run in stored[:RUNS]:
        rows += sum(r.kind in ("op", "model", "ledger", "fairness") for r in run.rows)
        if count and rows > ROWS:
            break
        count += 1
    return count


def write(out, files):
    """Writes {path below out: bytes}, each beside and renamed, and removes pictures that only an earlier
    report had."""
    try:
        listing = out / "figures" / DRAWN
        before = set(read_text(listing).split("\n")) if is_there(listing) else set()
        pictures = sorted(name for name in files if name.startswith("figures/"))
        for name, data in {**files, f"figures/{DRAWN}": "\n".join(pictures).encode()}.items():
            write_whole(out / name, data)
        for name in before - set(pictures):
            if name.startswith("figures/") and name.endswith((".svg", ".png")) and ".." not in name:
                (out / name).unlink(missing_ok=True)
    except OSError as e:
        raise LabError(f"cannot write {e.filename or out}: {e.strerror}") from None
