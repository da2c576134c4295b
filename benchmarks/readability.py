"""How long the sentences of the pages are: the median, and the share of those with more than 30 words.

    python benchmarks/readability.py                  # README.md and docs/*.md
    python benchmarks/readability.py PAGE OR FOLDER...  # other pages, such as those of another project

Read is what a person reads as prose: paragraphs and items of lists. Left out are code blocks, formulas, tables,
headings, pictures, comments and front matter. A piece of code within a line counts as one word, a link as its text. A
sentence ends with a full stop, a question or an exclamation mark before white space, or with its paragraph or item. The
last line is over all pages together.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

LONG = 30
ENDINGS = {".md", ".qmd", ".rst"}
ROOT = Path(__file__).resolve().parents[1]


def prose(text: str) -> list[str]:
    """The paragraphs and items of a page, as a person reads them."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"(?ms)^[ \t]*(```+|~~~+).*?^[ \t]*\1[ \t]*$", "\n\n", text)
    text = re.sub(r"(?s)<!--.*?-->|\$\$.*?\$\$", "\n\n", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)(\{[^}]*\})?", " ", text)
    text = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", text)
    text = re.sub(r"`[^`\n]+`", "code", text)
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or re.match(r"(#+ |\||:::|<|\{\{|={3,}$|-{3,}$|!!! |\?\?\? )", stripped):
            blocks.append([])
        elif re.match(r"([-*+]|\d+[.)])\s", stripped):
            blocks.append([re.sub(r"^([-*+]|\d+[.)])\s+", "", stripped)])
        else:
            blocks[-1].append(stripped)
    return [re.sub(r"<[^>]+>|\*\*|__|(?<!\w)[*_]|[*_](?!\w)", "", " ".join(block)) for block in blocks if block]


def lengths(text: str) -> list[int]:
    """Words of each sentence; what has fewer than three words is a label and no sentence."""
    found = []
    for block in prose(text):
        for sentence in re.split(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9]|code\b)", block):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            found += [len(words)] if len(words) >= 3 else []
    return found


def main() -> None:
    named = [Path(each) for each in sys.argv[1:]] or [ROOT / "README.md", ROOT / "docs"]
    pages = [
        page
        for each in named
        for page in (sorted(p for p in each.iterdir() if p.suffix in ENDINGS) if each.is_dir() else [each])
    ]
    everything: list[int] = []
    print(f"{'page':40} {'sentences':>9} {'median':>6} {'above ' + str(LONG):>9}")
    for page in [*pages, None]:
        words = lengths(page.read_text(encoding="utf-8")) if page else everything
        everything += words if page else []
        if words:
            share = sum(each > LONG for each in words) / len(words)
            name = page.name if page else "all"
            print(f"{name:40} {len(words):9} {statistics.median(words):6.0f} {share:9.1%}")


if __name__ == "__main__":
    main()
