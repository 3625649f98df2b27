"""Several `lab` commands in one process, for a process takes seconds to import torch."""

import json
import os
import re
import subprocess
import sys

DRIVER = """
import json, sys
from lab.cli import main
for words in json.loads(sys.argv[1]):
    try:
        status = main(words)
    except SystemExit as ended:  # --help
        status = ended.code or 0
    print("<status>", status, "<end>", sep="", flush=True)
"""


def run(commands, folder, settings):
    """[(exit status, what it printed)] of commands, each a list of words, in `folder`; settings: of the
    environment."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)],
        cwd=folder,
        env={**os.environ, **settings},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said = re.findall(r"(.*?)<status>(\d+)<end>\n", done.stdout, re.S)
    assert len(said) == len(commands), done.stdout
    return [(int(status), text) for text, status in said]
