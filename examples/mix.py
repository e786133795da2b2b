"""Shuffle a text that is ordered, such as books one after the other, piece by piece.

    python examples/mix.py BOOKS.txt.xz MIXED.txt --held-out HELD_OUT.txt

A text that streams can be shuffled only among neighbours. A model that is trained on one author at a time forgets the
last one, and what is measured on another text is how near the two authors are. Pieces are whole lines. Some can
be held out, to measure on what is like the text and was not learnt. The text is held in memory.
"""

import argparse
import bz2
import gzip
import lzma
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from finedeep_files.whole_file import write_whole

OPEN = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


def main() -> None:
    """Read, shuffle, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="UTF-8; .xz, .gz or .bz2 too")
    parser.add_argument("out", type=Path, help="a file to write")
    parser.add_argument("--characters", type=int, default=2000, help="in a piece, at least (default: 2000)")
    parser.add_argument("--held-out", type=Path, metavar="FILE", help="a file for pieces that are not in OUT")
    parser.add_argument("--held-out-pieces", type=int, default=500, metavar="N", help="how many (default: 500)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with OPEN.get(arguments.text.suffix, open)(arguments.text, "rt", encoding="utf-8") as lines:
        pieces = list(pieces_of(lines, arguments.characters))
    random.Random(arguments.seed).shuffle(pieces)
    held_out = arguments.held_out_pieces if arguments.held_out else 0
    if held_out >= len(pieces):
        parser.error(f"{arguments.text} has {len(pieces)} pieces; {held_out} cannot be held out.")
    write_whole(arguments.out, "".join(pieces[held_out:]))
    if held_out:
        write_whole(arguments.held_out, "".join(pieces[:held_out]))


def pieces_of(lines: Iterable[str], characters: int) -> Iterator[str]:
    """Lines together until they have so many characters; the last piece may have fewer. Each ends with a line."""
    piece, size = [], 0
    for line in lines:
        piece.append(line if line.endswith("\n") else line + "\n")
        size += len(line)
        if size >= characters:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


if __name__ == "__main__":
    main()
