"""Reports: what the ledger says, as Markdown with SVG, as CSV, and as one HTML page that needs nothing beside it.

    tables.py     ledger -> a frame with a row a cell (written as cells.csv) -> tables
    figures.py    frame -> SVG
    words.py      frame -> sentences, numbers -> text
    page.py       all of it, in order; templates/ give it the two shapes

A report reads the ledger and what the problems and backends say of themselves; it never measures. The same ledger gives
the same bytes.
"""

from pathlib import Path

from harness import UserError
from harness.ledger import Run
from reports import page, tables


def write(runs: list[Run], to: Path) -> Path:
    """Write index.html, index.md, cells.csv and figures/ into the folder `to`; returns the path of index.html."""
    rows = tables.frame(runs)
    content = page.build(runs, rows)
    files = {
        "index.html": page.render("index.html.j2", content),
        "index.md": page.render("index.md.j2", content),
        "cells.csv": rows.to_csv(index=False, lineterminator="\n"),
        **{f"figures/{picture.name}.svg": picture.svg for picture in content.pictures()},
    }
    try:
        for name, text in files.items():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_text(text, encoding="utf-8")
    except OSError as e:
        raise UserError(f"The report cannot be written to {to}: {e.strerror}; name another folder with --to.") from None
    return to / "index.html"
