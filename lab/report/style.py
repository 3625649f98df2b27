"""How a backend, an op and a page look: one colour and one marker each, the same in every picture.

The backends' colours keep a contrast of at least 3:1 on the light and on the dark page, and CUDA, Triton and
torch stay apart under protanopia, deuteranopia and tritanopia (tests/test_report.py computes both). Markers
differ as well, so that no picture depends on colour alone.
"""

from dataclasses import dataclass

import matplotlib

from lab import declared

matplotlib.use("Agg")


@dataclass(frozen=True)
class Look:
    label: str
    color: str
    marker: str


BACKENDS = {
    "cuda": Look("CUDA", "#2d7dd2", "o"),
    "triton": Look("Triton", "#d9730d", "s"),
    "torch": Look("torch", "#7d868f", "D"),
    "cublas": Look("cuBLAS", "#1a9c74", "^"),
    "sdpa_flash": Look("SDPA flash", "#c65f9c", "v"),
    "cudnn": Look("cuDNN", "#9a8a1f", "P"),
    "flashinfer": Look("FlashInfer", "#8a63d2", "X"),
    "liger": Look("Liger", "#3f9aa8", "<"),
    "compile": Look("torch.compile", "#a5654b", ">"),
}
# What a token's time is made of: the colours that the contracts declare (Op.color; Paul Tol's "muted" scheme,
# not used for backends). A fused op has the colour of what it does most, hatched; a whole step is hatched the
# other way.
HATCHES = {"FusedOps": "\\\\", "PersistentOps": "//"}
OTHERS = ("#aa4499", "#5f6b7a", "#a5654b", "#3f9aa8")


# plan: its line's style, and its markers': hollow, full, or full with a rim in the colour of the text.
PLANS = {"basic": ("-", "hollow"), "fused": ("--", "full"), "persistent": ("-.", "rimmed")}


def backend(name):
    """The look of a backend; one that the table does not know gets grey and its own name."""
    return BACKENDS.get(name, Look(str(name), "#7d868f", "*"))


def backend_order(names):
    """Known backends in the table's order, then the others by name."""
    known = list(BACKENDS)
    return sorted(set(names), key=lambda n: (known.index(n) if n in known else len(known), str(n)))


def part_order(op):
    """Sorts ops as a decode step runs them; the others come last."""
    order = declared.names()
    return order.index(op) if op in order else len(order)


def text_on(color):
    """White or near-black, whichever can be read on a colour."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#1b1f23"


def part_looks(parts):
    """part -> (colour, hatch); the lab's ops always have the same one, others take what is left, in order."""
    hatches = {op: HATCHES.get(group, "") for group, ops in declared.groups().items() for op in ops}
    looks, others = {}, 0
    for part in parts:
        color = declared.color(part)
        if color is None:
            color = OTHERS[others % len(OTHERS)]
            others += 1
        looks[part] = color, hatches.get(part, "")
    return looks


PAGE = "#ffffff"  # the background of a picture
INK = "#1b1f23"  # its text
MUTED = "#59636e"  # its secondary text
GRID = "#e3e6ea"


def rc():
    """The pictures' matplotlib settings, for matplotlib.rc_context."""
    return {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 8.5,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "figure.facecolor": PAGE,
        "savefig.facecolor": PAGE,
        "axes.facecolor": PAGE,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.edgecolor": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
        "errorbar.capsize": 2.5,
        "hatch.linewidth": 0.6,
        "figure.dpi": 200,
        "text.parse_math": False,
        "axes.unicode_minus": False,
    }
