"""Drawings of what a step of a kernel does: which lane reads which line, bank or tile, who has which split.

    python -m lab.report.drawings       writes them to docs/course/figures

What they show is computed from the constants of the kernels that they explain. The course and the rungs of
the page (Rung.drawing) show them. Their colours follow the page's theme, as those of the pictures do
(lab/report/svg.py).
"""

import re
from dataclasses import dataclass
from html import escape

from lab.report import style
from lab.report.svg import FONT
from lab.report.twins import ROOT
from lab.rungs.decode_attention import PAGE_SIZE

FOLDER = ROOT / "docs" / "course" / "figures"
LANES, LINE, BANKS, BANK = 32, 128, 32, 4  # of a warp; bytes of a line; banks of shared memory, bytes of one
INK, MUTED, GRID = (f"var(--p-{name})" for name in ("ink", "muted", "grid"))
ONE, OTHER = style.BACKENDS["cuda"].color, style.BACKENDS["triton"].color
WIDTH = 640


@dataclass(frozen=True)
class Drawing:
    name: str
    title: str
    body: str
    height: int

    @property
    def inline(self) -> str:
        """As an element of the page, which defines the colours."""
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" role="img"'
        return f'<svg class="drawing" {size} aria-label="{escape(self.title)}">{self.body}</svg>'

    @property
    def alone(self) -> str:
        """As a file."""
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}" role="img"'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}><title>{escape(self.title)}</title>'
            f"<style>{style.css()}text{{font-family:{FONT}}}</style>"
            f'<rect width="100%" height="100%" fill="var(--p-page)"/>\n{self.body}</svg>\n'
        )


def constant(file: str, name: str) -> int:
    """A number that a kernel's file defines, as in `constexpr int kStages = 8;`."""
    found = re.search(rf"\b{name} = (\d+)", (ROOT / file).read_text())
    return int(found[1])


# The marks of a drawing


def box(x, y, width, height, fill="none", stroke=GRID, opacity=1.0):
    shade = f' fill-opacity="{opacity}"' if opacity < 1 else ""
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} fill="{fill}"{shade} stroke="{stroke}"/>\n'


def text(x, y, words, size=12, color=INK, anchor="start", bold=False):
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"'
    return f"<text {place}{weight}>{escape(str(words), quote=False)}</text>\n"


def line(x1, y1, x2, y2, color=MUTED):
    return f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{color}" fill="none"/>\n'


# The drawings


def lanes() -> Drawing:
    """Which lines of memory one load of a warp touches: rungs 1, 4 and 5 of linear, in bfloat16."""
    element, k = 2, 14336
    ways = (
        ("Linear, rung 1: a row a lane", element, lambda lane: lane * k * element),
        ("Rung 4: neighbouring elements", element, lambda lane: lane * element),
        ("Rung 5: 16 bytes a lane", 16, lambda lane: lane * 16),
    )
    body, y, scale = "", 18, 4
    for title, size, address in ways:
        used = {}  # line -> [(first byte, lane)]
        for lane in range(LANES):
            used.setdefault(address(lane) // LINE, []).append((address(lane) % LINE, lane))
        share = LANES * size / (LINE * len(used))
        many = f"{len(used)} line" + "s" * (len(used) > 1)
        body += text(8, y, title, bold=True)
        body += text(250, y, f"{many} of {LINE} bytes, of which {share:.0%} are used".replace("%", " %"))
        shown = list(used.items())[:4]
        for number, parts in shown:
            y += 20
            body += text(8, y + 11, f"line {number:,}", 11, MUTED)
            body += box(100, y, LINE * scale, 14)
            for first, lane in parts:
                color = ONE if lane % 2 == 0 else OTHER
                body += box(100 + first * scale, y, size * scale, 14, color, "none")
        if len(used) > len(shown):
            y += 18
            body += text(100, y + 11, f"... and {len(used) - len(shown)} more, one for each lane", 11, MUTED)
        y += 42
    body += text(
        8,
        y - 8,
        "Each coloured piece is what one lane reads; colours alternate from lane to lane.",
        11,
        MUTED,
    )
    return Drawing("lanes", "The lines of memory that one load of a warp touches", body, y)


def banks() -> Drawing:
    """Which banks the lanes of a warp read when each reads the same column of its own row: rungs 2 and 3 of
    linear, in bfloat16."""
    file, element, cell = "cuda_src/ladder/linear.cu", 2, 8
    rows, cols = constant(file, "kTileRows"), constant(file, "kTileCols")
    body = ""
    for i, (title, pad) in enumerate(
        (("Linear, rung 2", 0), ("Rung 3: rows one bank longer", BANK // element))
    ):
        left, top = 8 + 320 * i, 40
        hit = [(row, row * (cols + pad) * element // BANK % BANKS) for row in range(rows)]
        steps = max(sum(bank == b for _, b in hit) for bank in range(BANKS))
        body += text(left, 16, title, bold=True)
        body += text(left, 32, f"the read takes {steps} step" + "s" * (steps > 1), 11, MUTED)
        body += box(left, top, BANKS * cell, rows * cell)
        for bank in range(4, BANKS, 4):
            body += line(left + bank * cell, top, left + bank * cell, top + rows * cell, GRID)
        for row, bank in hit:
            body += box(left + bank * cell, top + row * cell, cell, cell, OTHER if steps > 1 else ONE, "none")
    y = 40 + rows * cell
    body += text(
        8, y + 18, f"down: lane 0 to {rows - 1}, each of which reads column 0 of its own row of the tile", 11
    )
    body += text(8, y + 34, f"across: bank 0 to {BANKS - 1}; a bank serves one address a step", 11)
    return Drawing("banks", "The banks of shared memory that a warp reads", body, y + 44)


def ring() -> Drawing:
    """Which copies are in flight in a ring: rung 6 of linear."""
    stages = constant("cuda_src/ladder/linear.cu", "kStages")
    body, cell, top = text(8, 16, f"A ring of {stages} stages, step by step", bold=True), 44, 44
    for stage in range(stages):
        body += text(120 + (stage + 0.5) * cell, 36, f"stage {stage}", 10, MUTED, "middle")
    steps = stages + 2
    for i in range(steps):
        y = top + i * 22
        body += text(8, y + 15, f"step {i}", 11)
        for load in range(i, i + stages):
            x = 120 + load % stages * cell
            if load == i:
                look = dict(fill=ONE, stroke="none")
            elif load == i + stages - 1:
                look = dict(fill="none", stroke=OTHER)
            else:
                look = dict(fill=OTHER, stroke="none", opacity=0.35)
            body += box(x + 2, y + 2, cell - 4, 18, **look)
            color = style.text_on(ONE) if load == i else INK
            body += text(x + cell / 2, y + 15, load, 11, color, "middle")
    y, x = top + steps * 22 + 20, 120 + stages * cell + 8
    for row, (look, words) in enumerate(
        (
            (dict(fill=ONE, stroke="none"), "used"),
            (dict(fill=OTHER, stroke="none", opacity=0.35), "in flight"),
            (dict(fill="none", stroke=OTHER), "issued after use"),
        )
    ):
        body += box(x, top + row * 24, 14, 14, **look) + text(x + 20, top + 11 + row * 24, words, 11)
    body += text(
        8,
        y,
        f"A number is that of a load of 16 bytes a lane. {stages - 1} are under way when one is used.",
        11,
    )
    return Drawing("ring", "A ring of copies in shared memory, step by step", body, y + 12)


def tile() -> Drawing:
    """What the lanes of a warp hold of one multiply on tensor cores: rung 8 of linear."""
    file, cell, top = "cuda_src/ladder/linear.cu", 15, 44
    rows, batch = constant(file, "kMmaRows"), constant(file, "kMmaBatch")
    each, columns = 8, 4 * 8  # 16 bytes in bfloat16; four lanes beside each other
    shown = {0: ONE, 5: OTHER}  # lanes
    body = ""

    def matrix(left, title, height, width, owner, scale):
        made = text(left, 16, title, bold=True)
        for r in range(height):
            for c in range(width):
                lane, x, y = owner(r, c), left + c * scale, top + r * cell
                if lane in shown:
                    made += box(x, y, scale, cell, shown[lane], "none")
                if scale >= 20:
                    color = style.text_on(shown[lane]) if lane in shown else MUTED
                    made += text(x + scale / 2, y + 0.8 * cell, lane, 10, color, "middle")
        made += box(left, top, width * scale, height * cell)
        for r in range(1, height):
            made += line(left, top + r * cell, left + width * scale, top + r * cell, GRID)
        for c in range(1, width):
            made += line(left + c * scale, top, left + c * scale, top + height * cell, GRID)
        return made

    body += matrix(8, f"w: {rows} rows", rows, columns, lambda r, c: r % 8 * 4 + c // each, 8)
    body += text(8, 34, f"{columns} columns; a lane loads {each} neighbours of 2 rows", 10, MUTED)
    body += matrix(286, f"x: {batch} rows", batch, columns, lambda r, c: r * 4 + c // each, 4)
    body += text(286, 34, "the same of 1 row", 10, MUTED)
    result = {}  # (row of w, row of x) -> lane: the kernel's sums.warp[..][2 * t + i % 2][g + i / 2 * 8]
    for lane in range(LANES):
        g, t = divmod(lane, 4)
        for i in range(4):
            result[g + i // 2 * 8, 2 * t + i % 2] = lane
    body += matrix(440, f"sums: {rows} x {batch}", rows, batch, lambda r, c: result[r, c], 22)
    body += text(440, 34, f"{rows * batch // LANES} a lane, whose number is shown", 10, MUTED)
    y = top + rows * cell + 18
    body += text(
        8, y, f"Lanes 0 and 5 of {LANES} are coloured. One instruction multiplies for all of them.", 11
    )
    return Drawing("tile", "What the lanes of a warp hold of a multiply on tensor cores", body, y + 12)


def splits() -> Drawing:
    """A sequence in pages, its splits, and their merge: rung 4 of decode_attention."""
    pages, count = 12, 4
    where = [(5 * page + 7) % 19 for page in range(pages)]  # anywhere, each once
    body = text(8, 16, f"One sequence of {pages * PAGE_SIZE} tokens, {count} splits", bold=True)
    step, left = 44, 90
    body += text(8, 46, "block table", 11, MUTED) + text(8, 82, "cache", 11, MUTED)
    colors = (ONE, OTHER)
    small = 520 / (max(where) + 1)
    for page, slot in enumerate(where):
        look = dict(fill=colors[page * count // pages % 2], stroke="none", opacity=0.45)
        body += box(left + page * step, 32, step - 4, 20, **look)
        body += text(left + page * step + step / 2 - 2, 46, slot, 11, INK, "middle")
        body += line(left + page * step + step / 2 - 2, 52, left + (slot + 0.5) * small, 70, GRID)
        body += box(left + slot * small, 70, small - 2, 16, **look)
    for slot in set(range(max(where) + 1)) - set(where):
        body += box(left + slot * small, 70, small - 2, 16)
    for split in range(count):
        x, width = left + split * step * pages / count, step * pages / count - 4
        body += box(x, 112, width, 42, colors[split % 2], "none", 0.45)
        body += text(x + width / 2, 130, f"block {split}", 12, INK, "middle", bold=True)
        body += text(x + width / 2, 146, "max, mass, sum of v", 10, INK, "middle")
        body += line(x + width / 2, 154, left + step * pages / 2, 180)
    body += box(left + step * pages / 2 - 130, 180, 260, 26, "none", INK)
    body += text(left + step * pages / 2, 197, "merge: rescale to the largest max, add", 11, INK, "middle")
    body += text(8, 134, "blocks", 11, MUTED)
    body += text(
        8,
        228,
        f"A number is a page of {PAGE_SIZE} tokens, which may lie anywhere; white ones are others'.",
        11,
    )
    return Drawing("splits", "A sequence in pages, divided among blocks", body, 240)


DRAWINGS = {make.__name__: make for make in (lanes, banks, ring, tile, splits)}


def write(folder=FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in DRAWINGS.items():
        (folder / f"{name}.svg").write_text(make().alone, encoding="utf-8")


if __name__ == "__main__":
    write()
