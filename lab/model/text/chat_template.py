"""Hugging Face chat templates. A template is somebody else's code: it runs in jinja2's sandbox, in a process
of its own (lab/model/text/process.py) that bounds its memory and time.

What a template sees is what transformers gives it (apply_chat_template and utils/chat_template_utils.py):
`messages`, `tools` and `documents` (none), `add_generation_prompt`, the special tokens by name,
`raise_exception`, `strftime_now`, the filter `tojson`, loop controls and `{% generation %}` blocks.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping

from lab.errors import LabError, Unavailable

MAX_CHARACTERS = 1 << 24  # more than any model's context holds


def render(template: str, messages: list[dict], special: Mapping[str, object]) -> str:
    """The text of `messages` ({"role", "content"}), ready for the reply.

    Raises LabError if the template refuses them.
    """
    environment = _environment()
    text = environment.from_string(template).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=True, **special
    )
    if len(text) > MAX_CHARACTERS:
        raise LabError(f"the chat template makes a prompt of {len(text)} characters; use --raw")
    return text


def _environment():
    try:
        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise Unavailable(
            f"chat templates need the package jinja2 ({error}): run `pip install jinja2`"
        ) from None

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what the model wrote, for training."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json  # jinja2's own escapes HTML and ignores ensure_ascii
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message):
    raise LabError(f"the chat template refuses these messages: {message}")
