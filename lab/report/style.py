"""How a backend, an op and a page look: one colour and one marker each, the same in every picture.

The backends' colours keep a contrast of at least 3:1 on the light and on the dark page, and CUDA, Triton and
torch stay apart under protanopia, deuteranopia and tritanopia (tests/test_report.py computes both). Markers
differ as well, so that no picture depends on colour alone.
"""

from dataclasses import dataclass, replace

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
    "flashinfer_tensor": Look("FlashInfer, tensor cores", "#b5544a", "x"),
    "liger": Look("Liger", "#3f9aa8", "<"),
    "gemlite": Look("GemLite", "#a8731f", "d"),
    "int4pack_mm": Look("torch int4pack_mm", "#b0647a", "p"),
    "scaled_mm": Look("torch scaled_mm", "#6a7f2a", "h"),
    "nccl": Look("NCCL", "#4f8f1e", "*"),
    "gloo": Look("gloo", "#5f8299", "H"),
    "torch_one_shot": Look("torch one-shot", "#bd5a70", "8"),
    "torch_two_shot": Look("torch two-shot", "#7d72d6", "."),
    "compile": Look("torch.compile", "#a5654b", ">"),
}
# What a token's time is made of has the colours that the contracts declare (Op.color; Paul Tol's "muted"
# scheme, not used for backends); parts without one take these.
OTHERS = ("#5f55c4", "#aa4499", "#a5654b", "#3f9aa8", "#999933", "#117733")
REST = "#8a939c"


PLANS = ("basic", "fused", "persistent")  # in this order wherever they are listed


def backend(name):
    """The look of a backend; one that the table does not know gets grey and its own name. Of a backend whose
    sums over ranks are a library's, as cuda+nccl, the library's look, and both names."""
    if name in BACKENDS:
        return BACKENDS[name]
    kernels, _, library = str(name).partition("+")
    if kernels in BACKENDS and library in BACKENDS:
        of_both = f"{BACKENDS[kernels].label} + {BACKENDS[library].label}"
        return replace(BACKENDS[library], label=of_both)
    return Look(str(name), "#7d868f", "*")


def backend_order(names):
    """Known backends in the table's order, then the others by name."""
    known = list(BACKENDS)
    return sorted(set(names), key=lambda n: (known.index(n) if n in known else len(known), str(n)))


def part_order(op):
    """Sorts ops as a decode step runs them; the others come last."""
    order = declared.names()
    return order.index(op) if op in order else len(order)


def text_on(color):
    """White or near-black, whichever can be read on a colour; the same on the light and the dark page."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "#fdfdfd" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#15181c"


def part_colors(parts):
    """part -> colour, no colour twice: what the op declares, where no part before it has that."""
    colors = {}
    for part in parts:
        wished = [declared.color(part), *OTHERS]
        colors[part] = next((c for c in wished if c and c not in colors.values()), REST)
    return colors


PAGE = "#ffffff"  # the background of a picture
INK = "#1b1f23"  # its text
MUTED = "#59636e"  # its secondary text
GRID = "#e3e6ea"
NEUTRAL = {  # name of the CSS variable: (colour of a picture, what the dark page makes of it)
    "page": (PAGE, "#171b20"),
    "ink": (INK, "#e8eaed"),
    "muted": (MUTED, "#a2abb5"),
    "grid": (GRID, "#31373e"),
}


def themed(css):
    """CSS with the variable in the place of every colour that differs between the light and the dark page."""
    for name, (light, _) in NEUTRAL.items():
        css = css.replace(light, f"var(--p-{name})")
    return css


def css():
    """The definition of the variables."""
    light, dark = ("".join(f"--p-{name}:{colors[i]};" for name, colors in NEUTRAL.items()) for i in (0, 1))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


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
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.facecolor": "none",
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
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
        "errorbar.capsize": 0,
        "hatch.linewidth": 0.6,
        "figure.dpi": 72,
        "svg.fonttype": "none",  # text stays text
        "text.parse_math": False,
        "axes.unicode_minus": False,
    }
