"""What tests of the report share: records, the page's tags and text, and a headless Chromium."""

import html as htmllib
import json
import os
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import synthetic_records as synthetic

from lab.records.schema import Env, OpRow
from lab.report import build

SMALL = dict(models=["llama-3.2-1b"], batches=(1, 16), contexts=(1024, 8192))
VIEWS = ((1440, 900), (768, 1024), (390, 844))  # widths and heights of windows
EVIL = '<script>alert("x")</script>\'"&`|[a](b) $x_1^2$ \x07'


def report(source, out=None, run=None):
    return build.main(SimpleNamespace(dir=str(source), out=out and str(out), run=run))


def env(run="r", **fields):
    return Env(
        **{
            "run": run,
            "when": "before",
            "device": "cuda",
            "gpu": "Synthetic GPU",
            "commit": "0",
            "throttle": [],
            "notes": [synthetic.NOTE],
            **fields,
        }
    )


def op_row(run="r", backend="cuda", **fields):
    return OpRow(
        **{
            "run": run,
            "op": "linear",
            "backend": backend,
            "dtype": "bf16",
            "batch": 1,
            "role": "qkv",
            "shape": {"n": 8, "k": 8},
            "us": 10.0,
            "us_p10": 9.0,
            "us_p90": 11.0,
            "n": 20,
            "bytes": 20000000,
            "flops": 20000000,
            "gbps": 2000.0,
            "of_ceiling": 0.66,
            **fields,
        }
    )


class Page(HTMLParser):
    """What the tests ask of a page: tags with their attributes, and the text outside script and style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._skip = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._skip += tag in ("script", "style")

    def handle_endtag(self, tag):
        self._skip -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._skip:
            self.text.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def draw(tmp_path, rows):
    synthetic.write(tmp_path, rows)
    assert report(tmp_path) == 0
    return "".join(Page((tmp_path / "index.html").read_text()).text)


PROBE = """<script>
"use strict";
const faults = [];
addEventListener("error", e => faults.push("error: " + e.message));
addEventListener("unhandledrejection", e => faults.push("rejection: " + e.reason));
addEventListener("securitypolicyviolation", e => faults.push("blocked: " + e.violatedDirective));
for (const level of ["error", "warn"])
  console[level] = (...words) => faults.push(level + ": " + words.join(" "));
addEventListener("load", () => {
  const look = state => {
    if (document.documentElement.scrollWidth > innerWidth)
      faults.push(state + ": the page is wider than the window");
    for (const e of document.querySelectorAll("[hidden]"))
      if (e.checkVisibility()) faults.push(state + ": hidden, but shown: " + e.textContent.slice(0, 60));
    for (const e of document.querySelectorAll("h1,h2,h3,h4,p,li,dt,dd,summary,label,select,a,caption")) {
      if (e.closest(".scroll,.skip,[hidden],nav") || !e.checkVisibility()) continue;
      const box = e.getBoundingClientRect();
      if (box.right > innerWidth + 1 || box.left < -1 || e.scrollWidth > e.clientWidth + 1 && e.clientWidth)
        faults.push(state + ": cut off: " + e.tagName + " " + e.textContent.trim().slice(0, 60));
    }
    const boxes = [...document.querySelectorAll(".card,.best,.groups,.notice,.twin,h1,h2,.facts")]
      .filter(e => e.checkVisibility()).map(e => [e, e.getBoundingClientRect()]);
    for (const [i, [a, x]] of boxes.entries()) for (const [b, y] of boxes.slice(i + 1)) {
      const wide = Math.min(x.right, y.right) - Math.max(x.left, y.left);
      const high = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
      if (wide > 1 && high > 1 && !a.contains(b) && !b.contains(a))
        faults.push(state + ": overlap: " + a.className + " and " + b.className);
    }
  };
  look("as opened");
  const height = document.documentElement.scrollHeight;
  const ends = [...document.querySelectorAll(".run:not([hidden]) .verdict :is(p, svg)")]
    .filter(e => e.checkVisibility()).map(e => e.getBoundingClientRect().bottom);
  for (const d of document.querySelectorAll("details")) d.open = true;
  look("all open");
  const pictures = [...document.querySelectorAll(".run:not([hidden]) svg.plot")];
  for (const i of pictures)
    if (!i.getBoundingClientRect().width && !i.closest(".eager")) faults.push("picture: " + i.ariaLabel);
  for (const lines of document.querySelectorAll(".run:not([hidden]) .lines"))
    for (const radio of [...lines.querySelectorAll("input")].reverse()) {
      radio.click();
      if (![...lines.querySelectorAll(".s")].some(e => e.checkVisibility()))
        faults.push("no line is shown for " + radio.parentElement.textContent);
    }
  const pick = document.getElementById("run");
  const runs = pick ? [...pick.options].map(o => {
    pick.value = o.value;
    pick.dispatchEvent(new Event("change"));
    look("run " + o.value);
    return [...document.querySelectorAll(".run")].filter(r => !r.hidden).map(r => r.dataset.run).join();
  }) : [];
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const window = {width: innerWidth, high: innerHeight, height, ends, dark};
  parent.postMessage({...window, faults, pictures: pictures.length, runs}, "*");
});
</script>"""
FRAMES = """<!doctype html><body>{frames}<pre id="found"></pre><script>
const found = [];
addEventListener("message", e => {{
  found.push(e.data);
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>{frames_after}"""


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


needs_chromium = pytest.mark.skipif(
    chromium() is None, reason="needs Chromium or Chrome (apt-get install chromium), or CHROMIUM=path"
)


def probe(text, tmp_path, dark=False, script=PROBE):
    """What PROBE reports of a page in a frame of each width; Chromium's own windows are never narrower than
    500 px."""
    (tmp_path / "probed.html").write_text(text.replace("<title>", script + "<title>", 1))
    frames = "".join(f'<iframe src="probed.html" width="{w}" height="{h}"></iframe>' for w, h in VIEWS)
    (tmp_path / "frames.html").write_text(FRAMES.format(frames="", frames_after=frames))
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--window-size=1600,1000",
            "--virtual-time-budget=20000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--dump-dom",
            (tmp_path / "frames.html").as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert found and found[1], f"Chromium printed no result: {done.stderr[-500:]}"
    seen = json.loads(htmllib.unescape(found[1]))
    assert sorted(s["width"] for s in seen) == sorted(width for width, _ in VIEWS)
    return seen
