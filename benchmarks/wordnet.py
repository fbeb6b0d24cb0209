"""Makes benchmarks/data from WordNet 3.0: two tasks that no setting of this library was chosen on.

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    python benchmarks/wordnet.py wordnet/usr/share/wordnet

kinds: a definition → what kind of thing is defined. definitions: a word → its definition.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path


HERE = Path(__file__).parent
# Numbers of WordNet's lexicographer files (lexnames(5WN)).
KINDS = {5: "Animal", 6: "Object", 13: "Food", 15: "Place", 18: "Person", 20: "Plant"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="WordNet's dict folder")
    draw = random.Random(0)
    nouns = list(read(parser.parse_args().folder / "data.noun"))
    draw.shuffle(nouns)
    by_kind = defaultdict(list)
    for word, kind, gloss in nouns:
        if kind in KINDS and word.lower() not in gloss.lower():
            by_kind[kind].append({"definition": gloss, "kind": KINDS[kind]})
    kinds = [row for rows in zip(*(by_kind[kind] for kind in KINDS)) for row in rows]
    write("kinds", kinds[:1500], kinds[1500:2004])
    definitions = [
        {"word": word, "definition": gloss}
        for word, _, gloss in nouns
        if word.isalpha() and word.islower() and len(word) > 3
    ]
    write("definitions", definitions[:1600], definitions[1600:1800])


def read(file: Path):
    """Word, lexicographer file and definition (without examples) of each noun synset; no definition twice."""
    seen = set()
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):  # the license
            data, _, gloss = line.partition(" | ")
            fields = data.split()
            gloss = gloss.split('; "')[0].split(";")[0].strip()
            if 20 <= len(gloss) <= 120 and gloss not in seen:
                seen.add(gloss)
                yield fields[4].replace("_", " "), int(fields[1]), gloss


def write(name: str, train: list[dict], test: list[dict]) -> None:
    for part, rows in (("train", train), ("test", test)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / "data" / f"wordnet_{name}_{part}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
