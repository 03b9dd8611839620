"""report.html: complete in itself, the report's tables and pictures in it, nothing in it that runs."""

import base64
import re

from pipeline.report.html import render


def test_a_page_holds_table_and_pictures_and_loads_nothing() -> None:
    text = "# Title\n\n| a | b |\n|---|---:|\n| x | 1 |\n\n![scores](scores.png)\n\n![other](elsewhere.png)\n"
    page = render(text, "run <1>", {"scores.png": b"\x89PNG-bytes"})
    assert page.startswith("<!doctype html>")
    assert "<title>run &lt;1&gt;</title>" in page
    assert '<td style="text-align:right">1</td>' in page
    encoded = base64.b64encode(b"\x89PNG-bytes").decode()
    assert f'src="data:image/png;base64,{encoded}"' in page
    assert 'src="elsewhere.png"' in page  # no picture of this report: left as it is
    assert not re.search(r"https?://|<script|<link", page)


def test_what_looks_like_html_is_shown() -> None:
    page = render("| task |\n|---|\n| <script>alert(1)</script> & co |\n", "t", {})
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in page
