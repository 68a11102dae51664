"""A report's Markdown as one HTML page with its pictures in it, to send to a colleague.

Of Markdown it knows what the reports use: headings, paragraphs, lists, tables, pictures, `code`, **bold** and links.
"""

import base64
import html
import re
from collections.abc import Mapping

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
th { background: #f3f3f3; }
img { max-width: 100%; height: auto; }
code { background: #f3f3f3; padding: 0 0.2rem; }
pre code { display: block; padding: 0.5rem; overflow-x: auto; }
"""
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")


def to_html(markdown: str, pictures: Mapping[str, bytes]) -> str:
    """Return a whole HTML page for a report's text; `pictures` are PNG files by the names that the text has.

    The page asks for nothing else: no script, no style sheet, no font. A picture that is not there leaves its name.
    """
    blocks = [block.strip("\n") for block in re.split(r"\n{2,}", markdown.strip())]
    title = next((block[2:] for block in blocks if block.startswith("# ")), "Report")
    body = "\n".join(_block(block, pictures) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _block(block: str, pictures: Mapping[str, bytes]) -> str:
    lines = block.split("\n")
    heading = re.fullmatch(r"(#{1,6}) (.+)", block)
    if heading:
        level = len(heading[1])
        return f"<h{level}>{_inline(heading[2])}</h{level}>"
    picture = _PICTURE.fullmatch(block)
    if picture:
        return _picture(picture[1], picture[2], pictures)
    if all(line.startswith("|") for line in lines) and len(lines) > 1:
        return _table(lines)
    if all(line.startswith("    ") for line in lines):
        return "<pre><code>" + html.escape("\n".join(line[4:] for line in lines)) + "</code></pre>"
    if lines[0].startswith("- "):
        items = re.split(r"^- ", block, flags=re.MULTILINE)[1:]
        return "<ul>" + "".join(f"<li>{_inline(item.strip())}</li>" for item in items) + "</ul>"
    return f"<p>{_inline(block)}</p>"


def _table(lines: list[str]) -> str:
    head, _, *rows = [_cells(line) for line in lines]
    text = "<table>\n<tr>" + "".join(f"<th>{_inline(cell)}</th>" for cell in head) + "</tr>\n"
    for row in rows:
        text += "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>\n"
    return text + "</table>"


def _cells(line: str) -> list[str]:
    """The cells of a table's line; a bar with a backslash is text."""
    cells = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
    return [cell.strip().replace("\\|", "|") for cell in cells]


def _picture(caption: str, name: str, pictures: Mapping[str, bytes]) -> str:
    if name not in pictures:
        return f"<p>({html.escape(name)})</p>"
    data = base64.b64encode(pictures[name]).decode()
    return f'<p><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"></p>'


def _inline(text: str) -> str:
    """Text with code, bold and links; what is inside code stays as it is."""
    parts = re.split(r"`([^`]+)`", html.escape(text, quote=False))
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"<code>{part}</code>"
        else:
            part = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", part)
            parts[i] = re.sub(r"\[([^\]]+)\]\((https?://[^)\s\"]+)\)", r'<a href="\2">\1</a>', part)
    return "".join(parts)
