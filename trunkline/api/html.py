"""HTML for a notebook. Every text is escaped, since names of sites and columns come from other people's files."""

import html
from collections.abc import Sequence


def draw_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; without rows an empty text."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def draw_lines(lines: Sequence[str], *, bold: bool = False) -> str:
    """A paragraph for each line."""
    texts = [html.escape(line) for line in lines if line]
    return "".join(f"<p><b>{text}</b></p>" if bold else f"<p>{text}</p>" for text in texts)
