"""Clean public-domain fairy tales into a corpus: one book per block, one paragraph per line.

    python prepare_corpus.py BOOKS_DIR OUT_DIR

BOOKS_DIR holds Project Gutenberg's plain-text files. Writes train.txt and valid.txt (the last 5 %
of each book).
"""

from __future__ import annotations

import argparse
import re
import unicodedata
from pathlib import Path

BEGIN = re.compile(
    r"\*\*\* ?START OF (THIS|THE) PROJECT GUTENBERG.*?\*\*\*|\*END\* ?THE SMALL PRINT.*?\n",
    re.DOTALL,
)
END = re.compile(r"\*\*\* ?END OF (THIS|THE) PROJECT GUTENBERG|End of (the )?Project Gutenberg")
QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": " - "})


def book_text(path: Path) -> str:
    """The book without Gutenberg's licence header and footer."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    text = text.replace("\r\n", "\n")
    if begin := BEGIN.search(text):
        text = text[begin.end() :]
    if end := END.search(text):
        text = text[: end.start()]
    return text


def paragraphs(text: str) -> list[str]:
    """Clean paragraphs; headings, tables, notes and licence lines are left out."""
    kept = []
    for block in re.split(r"\n\s*\n", text):
        line = re.sub(r"\s+", " ", block).strip().replace("_", "")
        line = re.sub(r"\[(Footnote|Illustration|\d+)[^\]]*\]|\(\d+\)", "", line)
        line = unicodedata.normalize("NFKC", line).translate(QUOTES).replace("--", " - ")
        line = re.sub(" +", " ", line)
        is_prose = (
            len(line) >= 60
            and "Gutenberg" not in line
            and "http" not in line
            and sum(c.isdigit() for c in line) <= 8
            and sum(c.isupper() for c in line) <= 0.25 * len(line)
        )
        if is_prose:
            kept.append("".join(c for c in line if ord(c) < 256))
    return kept


def main() -> None:
    """Read the books, write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("books", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    books = [paragraphs(book_text(path)) for path in sorted(args.books.glob("*.txt"))]
    splits = {
        "train.txt": [book[: int(len(book) * 0.95)] for book in books],
        "valid.txt": [book[int(len(book) * 0.95) :] for book in books],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, parts in splits.items():
        (args.out / name).write_text("\n\n".join("\n".join(part) for part in parts) + "\n")
        print(f"{name}: {sum(map(len, parts))} paragraphs of {len(parts)} books")


if __name__ == "__main__":
    main()
