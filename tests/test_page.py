"""A page stands alone: what is foreign is escaped, nothing is loaded, and a reader sees the whole file."""

from pathlib import Path

from opensora.page import text, write_page


def test_a_page(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    write_page(path, "<Title>", f"<p title='{text(chr(39))}'>{text('<script>&')}</p>", "p { margin: 0; }")
    page = path.read_text("utf-8")
    assert page.startswith("<!doctype html>")
    assert "<title>&lt;Title&gt;</title>" in page
    assert "<p title='&#x27;'>&lt;script&gt;&amp;</p>" in page
    assert "default-src 'none'" in page
    assert page.index("color-scheme") < page.index("p { margin: 0; }") < page.index("</style>")
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
