"""Text shown as it is in gradio's help lines, which read *, _, ` and [a](b) as Markdown and know no escape for them.

Such characters travel as characters of Unicode's private use, and a script of the page puts the real ones back where
they are shown; so what is copied is what was meant, as *attn2* in a rule.
"""

from __future__ import annotations

import json

_MARKS = "*_`[]"
_FIRST = 0xF8A0
_HIDDEN = {mark: chr(_FIRST + number) for number, mark in enumerate(_MARKS)}
_TABLE = str.maketrans(_HIDDEN)

SCRIPT = f"""<script>
(() => {{
  const marks = {json.dumps({hidden: mark for mark, hidden in _HIDDEN.items()})};
  const hidden = new RegExp("[" + Object.keys(marks).join("") + "]", "g");
  const show = (line) => {{
    const texts = document.createTreeWalker(line, NodeFilter.SHOW_TEXT);
    for (let text = texts.nextNode(); text; text = texts.nextNode()) {{
      if (text.data.search(hidden) >= 0) text.data = text.data.replace(hidden, (one) => marks[one]);
    }}
  }};
  new MutationObserver((changes) => {{
    for (const change of changes) {{
      if (change.target.closest?.(".info-text")) show(change.target);
      for (const node of change.addedNodes) {{
        if (node.nodeType !== Node.ELEMENT_NODE) continue;
        if (node.matches(".info-text")) show(node);
        for (const line of node.querySelectorAll(".info-text")) show(line);
      }}
    }}
  }}).observe(document, {{ childList: true, subtree: true }});
}})();
</script>"""
"""Goes into the page's head."""


def literal(text: str) -> str:
    """A help line that is shown exactly so."""
    return text.translate(_TABLE)


def plain(text: str) -> str:
    """The inverse of `literal`."""
    return text.translate({ord(hidden): mark for mark, hidden in _HIDDEN.items()})
