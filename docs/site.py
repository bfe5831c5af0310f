"""MkDocs hooks: pages that lie elsewhere in the repository, links to them, and formulas without JavaScript."""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "kernels/README.md": "mathematics.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}  # page by file of the repository
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages; each keeps the place of its source, which its links are relative to."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_with_links(text, posixpath.dirname(source))))
    files.append(File.generated(config, "examples.md", content=_examples()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of the pages under docs/ that leave it."""
    source = page.file.src_uri
    if page.file.generated_by:
        return markdown
    return _with_links(markdown, posixpath.dirname(f"docs/{source}"), posixpath.dirname(source))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Formulas become MathML, which browsers show by themselves."""

    def mathml(match: re.Match[str]) -> str:
        return str(convert(unescape(match[2]), display="block" if match[1] == "div" else "inline"))

    return FORMULA.sub(mathml, html)


def _with_links(text: str, folder: str, page_folder: str = "") -> str:
    """Links of a file in `folder` of the repository, for a page in `page_folder` of the site."""

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match[1], posixpath.normpath(posixpath.join(folder, match[2])), match[3] or ""
        if target in PAGES:
            target = PAGES[target]
        elif target.startswith("examples/"):
            target, anchor = "examples.md", "#" + posixpath.basename(target).replace(".", "")
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:  # a file that is no page of the site
            return label
        return f"[{label}]({posixpath.relpath(target, page_folder or '.')}{anchor})"

    return LINK.sub(link, text)


def _examples() -> str:
    sections = ["# Examples\n"]
    for name in EXAMPLES:
        code = (ROOT / "examples" / name).read_text(encoding="utf-8").rstrip()
        sections.append(f"## {name}\n\n````python\n{code}\n````\n")
    return "\n".join(sections)
