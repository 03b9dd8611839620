"""report.html: the report's Markdown as one page that needs no other file, pictures included.

It opens from disk, from the object store and inside MLflow's artifact view, where a page may load nothing else.
"""

import base64
import html
from collections.abc import Mapping

from markdown_it import MarkdownIt
from markdown_it.token import Token

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", "Open Sans", sans-serif; color: #222; background: #fff;
       max-width: 1180px; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; background: #f3f3f3; padding: .1em .3em;
       overflow-wrap: anywhere; }
.table { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-size: .92em; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; white-space: nowrap; }
tbody tr:nth-child(even) { background: #fafafa; }
td[style*="right"] { font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; height: auto; margin: .75rem 0; }
li { overflow-wrap: anywhere; }
"""


def render(markdown: str, title: str, pictures: Mapping[str, bytes]) -> str:
    """The page. An image whose address is the name of one of the PNG `pictures` is put into it. Raw HTML in the
    Markdown is shown, not run."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for token in _all(tokens):
        if token.type == "image" and str(token.attrs.get("src")) in pictures:
            encoded = base64.b64encode(pictures[str(token.attrs["src"])]).decode()
            token.attrs["src"] = f"data:image/png;base64,{encoded}"
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}'
        "</body>\n</html>\n"
    )


def _all(tokens: list[Token]) -> list[Token]:
    return [each for token in tokens for each in [token, *_all(token.children or [])]]
