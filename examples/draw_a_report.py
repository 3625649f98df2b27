"""Draw a report: an op is measured under two backends, its records are read, and a page is drawn of them."""

import sys
import tempfile
from pathlib import Path

from lab.cli import main
from lab.records.schema import read

folder = Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp(prefix="lab-report-"))
bench = ["bench", "ops", "silu_mul", "--backend", "cuda,torch", "--model", "smollm2-135m", "--batch", "1"]
assert main([*bench, "--quick", "--no-vendor", "--out", str(folder)]) == 0
for row in read(folder).rows:  # every field has its unit in lab/records/schema.py
    if row.kind == "op":
        print(f"{row.op} by {row.backend}: {row.us:.1f} us{' (emulated)' * row.emulated}")
assert main(["report", str(folder)]) == 0
print(folder / "index.html")
