"""An HTML page that stands alone: it loads nothing, runs nothing foreign, and appears whole or not at all."""

import html
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #c0392b; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1080px; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { border-bottom: 1px solid var(--line); text-align: left; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
"""
HEAD = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
# Captions and addresses are foreign: whatever they hold, the page loads nothing, and runs its own script alone.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'{script}"


def write_page(path: Path, title: str, body: str, style: str = "", script: str = "") -> None:
    """Write a page of HTML fragments; a reader sees the whole file or none.

    Args:
        style: CSS that adds to STYLE.
        script: JavaScript; the page must be of use without it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    allowed = f"; script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" if script else ""
    policy = POLICY.format(script=allowed)
    head = f'{HEAD}<meta http-equiv=Content-Security-Policy content="{policy}">'
    end = f"<script>{script}</script>" if script else ""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(
            f"{head}<title>{text(title)}</title><style>{STYLE}{style}</style><body>{body}{end}</body></html>", "utf-8"
        )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def text(value: object) -> str:
    """`value` escaped, for any place in the page."""
    return html.escape(str(value), quote=True)
