"""Race a kernel: our Triton kernel with another block is judged and, on a GPU, measured against ours."""

import sys
import tempfile
from pathlib import Path

from lab.cli import main

folder = Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp(prefix="lab-race-"))
mine = folder / "my_silu_mul.py"
assert main(["new", "kernel", "silu_mul", "--out", str(mine)]) == 0
text = mine.read_text()
assert "elements=1024, block=1024" in text
mine.write_text(text.replace("elements=1024, block=1024", "elements=512, block=512"))  # or edit it yourself
status = main(["try", str(mine), "--op", "silu_mul", "--dtype", "fp32", "--out", str(folder / "race")])
print(f"{mine}: {'right' if status == 0 else 'refused'}")
sys.exit(status)
