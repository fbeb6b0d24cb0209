"""How the rows of the tasks kept aside are made; of what, is in benchmarks/data/README.md."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from aside_tasks import LABELS, TASKS


TRAIN, TEST = 480, 300  # rows


def write_data(sources: Path) -> None:
    """Make all rows anew.

    Args:
        sources (`Path`): Folder with the unpacked packages: `randfacts`, `faker`, `django`, `allauth` and `cms` of
            the wheels, and `dict` with WordNet's files.
    """
    draw = random.Random(0)
    facts = _facts(sources / "randfacts" / "safe.txt")
    examples = _examples(sources / "dict")
    draw.shuffle(facts)
    draw.shuffle(examples)
    need = TRAIN + TEST
    short = [fact for fact in facts if len(fact) <= 100]
    made: dict[str, Iterator[dict]] = {
        "1": (_pirate(fact, draw) for fact in short[:need]),
        "2": _bookings(sources, draw),
        "3": iter(_spanish(sources, draw)),
        "4": _queries(draw),
        "5": _who(examples[:20000]),
        "6": (row for row in map(_tagged, short[need:]) if row),
        "7": (row for row in map(_halved, [fact for fact in facts if len(fact) > 100]) if row),
        "8": (row for row in (_draft(text, draw) for text in examples[20000:]) if row),
    }
    for name, rows in made.items():
        known: dict[str, dict] = {}
        while len(known) < need:
            row = next(rows)
            known.setdefault(row["text"], row)
        found = list(known.values())
        draw.shuffle(found)
        for part, some in (("train", found[:TRAIN]), ("test", found[TRAIN:])):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
            TASKS[name].data(part).write_text(lines, encoding="utf-8")


def _facts(file: Path) -> list[str]:
    """Facts of one sentence or two, no two that begin alike."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        text = " ".join(line.split())
        if 40 <= len(text) <= 170 and text.isascii() and '"' not in text and text[0].isupper():
            found.setdefault(text[:25], text if text[-1] in ".!?" else f"{text}.")
    return list(found.values())


def _examples(folder: Path) -> list[str]:
    """The sentences that WordNet gives as examples."""
    found = {}
    for file in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{file}").read_text(encoding="utf-8").splitlines():
            for text in re.findall(r'"([^"]{18,90})"', line.partition(" | ")[2]):
                if text[0].isalpha() and text.isascii() and ";" not in text:
                    found.setdefault(text.lower(), text[0].upper() + text[1:].rstrip("."))
    return list(found.values())


# 1. A persona -------------------------------------------------------------------------------------

SAID = {"you": "ye", "your": "yer", "my": "me", "is": "be", "are": "be", "was": "were", "the": "th'", "of": "o'"}
SAID |= {
    "and": "an'",
    "for": "fer",
    "to": "t'",
    "over": "o'er",
    "never": "ne'er",
    "people": "landlubbers",
    "with": "wi'",
}
SAID |= {"man": "matey", "men": "mateys", "money": "doubloons", "children": "young swabs", "friend": "shipmate"}
OPENINGS = ["Arr!", "Shiver me timbers!", "Ahoy, matey!", "Blow me down!", "Yo ho!", "By Davy Jones!", "Avast!"]
CLOSINGS = ["Aye!", "Mark me words.", "So says th' captain.", "Or I'll walk th' plank!", "Savvy?", "Yarr."]


def _pirate(fact: str, draw: random.Random) -> dict:
    def said(match: re.Match) -> str:
        word = match[0]
        new = SAID.get(word.lower(), word)
        new = re.sub(r"(?<=\w\w)ing$", "in'", new)
        return new[0].upper() + new[1:] if word[0].isupper() else new

    told = re.sub(r"[A-Za-z]+", said, fact)
    return {"text": fact, "answer": f"{draw.choice(OPENINGS)} {told} {draw.choice(CLOSINGS)}"}


# 2. Extraction ------------------------------------------------------------------------------------

WHO_ASKS = """My name is {name}. / This is {name}. / {name} here. / Best wishes, {name} / Please book it for {name}. /
The room is for {name}. / I am {name}. / Put it under {name}, please. / It goes on the name of {name}."""
HOW_MANY = """There will be {guests} of us. / We are {guests}. / It is for {guests} people. / {guests} guests in all. /
A table for {guests}, so to speak. / We come with {guests} people. / Beds for {guests}, please."""
WHEN = """We arrive on {date}. / Our flight lands on {date}. / From {date}, if you can. / Is {date} still free? /
The trip begins on {date}. / Check-in would be {date}. / We were thinking of {date}."""
WHERE = """We want to stay in {city}. / It's your house in {city} that we like. / The place is {city}. / We are
coming to {city}. / Do you have anything in {city}? / {city} would be lovely."""
BESIDES = """Hello! / Is breakfast included? / We bring a dog. / Thanks a lot. / Hi there, / Good morning. / A quiet
room would be nice. / Can we park the car? / We loved it last year. / Sorry for the short notice. / I
hope you are well. / A high floor, please."""
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "one two three four five six seven eight nine".split()


def _bookings(sources: Path, draw: random.Random) -> Iterator[dict]:
    faker = sources / "faker" / "providers"
    people, places = faker / "person" / "en_US" / "__init__.py", faker / "address" / "de_DE" / "__init__.py"
    firsts = _words(people, "first_names_female") + _words(people, "first_names_male")
    lasts, cities = _words(people, "last_names"), _words(places, "cities")
    parts = {"name": WHO_ASKS, "city": WHERE, "date": WHEN, "guests": HOW_MANY}
    while True:
        month, day, guests = draw.randrange(12), draw.randint(1, 28), draw.randint(1, 9)
        given = {"name": f"{draw.choice(firsts)} {draw.choice(lasts)}", "city": draw.choice(cities)}
        said = {"date": draw.choice(["{m} {d}", "{d} {m}", "the {d} of {m}"]).format(m=MONTHS[month], d=day)}
        said["guests"] = draw.choice([str(guests), NUMBERS[guests - 1]])
        wanted = {**given, "date": f"{day:02}-{MONTHS[month][:3].upper()}", "guests": guests}
        ways = {part: _ways(texts) for part, texts in parts.items()}
        if draw.random() < 0.3:
            missing = draw.choice(["date", "guests", "city"])
            del ways[missing]
            wanted[missing] = None
        sentences = [draw.choice(texts).format(**given, **said) for texts in ways.values()]
        sentences += draw.sample(_ways(BESIDES), draw.randint(0, 2))
        draw.shuffle(sentences)
        text = " ".join(one[0].upper() + one[1:] for one in sentences)
        yield {"text": text, "answer": json.dumps(wanted, ensure_ascii=False)}


def _ways(texts: str) -> list[str]:
    return " ".join(texts.split()).split(" / ")


def _words(file: Path, name: str) -> list[str]:
    """The words in the assignment of `name` in a file of Faker's, which needs not be imported."""
    block = re.split(rf"^    {name} = ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    block = re.split(r"^    \w+ = ", block, maxsplit=1, flags=re.MULTILINE)[0]
    return sorted({word for word in re.findall(r'"([^"\n]+)"', block) if word.replace(" ", "").isalpha()})


# 3. Another language ------------------------------------------------------------------------------


def _spanish(sources: Path, draw: random.Random) -> list[dict]:
    """What three packages say to users, in English and in Spanish."""
    rows: dict[str, dict] = {}
    packages = ("django", "allauth", "cms")
    for file in (f for name in packages for f in sorted((sources / name).rglob("locale/es/LC_MESSAGES/django.po"))):
        for entry in file.read_text(encoding="utf-8").split("\n\n"):
            if "fuzzy" in entry or "msgid_plural" in entry or "msgctxt" in entry:
                continue
            text, answer = (_quoted(entry, key) for key in ("msgid", "msgstr"))
            if 12 <= len(text) <= 130 and answer and text != answer and "\\n" not in text + answer and "<" not in text:
                rows.setdefault(text, {"text": text, "answer": answer})
    found = list(rows.values())
    draw.shuffle(found)
    return found


def _quoted(entry: str, key: str) -> str:
    found = re.search(rf'^{key} ((?:"(?:[^"\\]|\\.)*"\s*)+)', entry, re.MULTILINE)
    return "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', found[1])).replace('\\"', '"').strip() if found else ""


# 4. SQL -------------------------------------------------------------------------------------------

# Each with columns of texts and of numbers.
TABLES = """
ships: name port flag captain / length crew built tonnage
books: title author genre publisher / pages price year copies
players: name team position country / goals age height salary
films: title director studio language / minutes budget rating year
orders: customer product status country / amount quantity weight discount
flights: airline origin destination gate / delay seats price distance
patients: name doctor ward diagnosis / age days weight room
employees: name department role office / salary age hours bonus
houses: street city owner style / rooms price area built
recipes: dish chef cuisine course / calories minutes servings cost
trees: species park district condition / height age width planted
songs: title artist album label / seconds plays year chart
cars: model maker color fuel / price doors mileage year
students: name course school teacher / grade age credits absences
mountains: name range country climber / height climbs year distance
tickets: event seat buyer venue / price row amount fee
animals: name species keeper cage / age weight length meals
wines: label grape region maker / year price bottles score
servers: host owner region system / cores memory load uptime
paintings: title painter museum period / width height price year
"""
VALUES = """
Lima Oslo Kiel Dover Hanna Marco Priya red blue green open closed urgent north south east west Delta
Omega Atlas Nova Orion spring winter large small wood steel Paris Quito Turin Ivan Chloe Omar silver
gold alpha beta gamma rural
""".split()
QUERIES = [
    ("List every {a} in {t}.", "SELECT {a} FROM {t}"),
    ("Which {a} has the highest {n}?", "SELECT {a} FROM {t} ORDER BY {n} DESC LIMIT 1"),
    ("Show the {k} {t} with the lowest {n}.", "SELECT * FROM {t} ORDER BY {n} ASC LIMIT {k}"),
    ("How many {t} have {a} {v}?", "SELECT COUNT(*) FROM {t} WHERE {a} = '{v}'"),
    ("What is the average {n} for each {a}?", "SELECT {a}, AVG({n}) FROM {t} GROUP BY {a}"),
    ("Give me {a} and {b} where {n} is above {x}.", "SELECT {a}, {b} FROM {t} WHERE {n} > {x}"),
    ("Find {t} whose {n} is less than {x} and whose {a} is {v}.", "SELECT * FROM {t} WHERE {n} < {x} AND {a} = '{v}'"),
    ("Total {n} of all {t} with {a} {v}", "SELECT SUM({n}) FROM {t} WHERE {a} = '{v}'"),
    ("Which different {a} are there?", "SELECT DISTINCT {a} FROM {t}"),
    ("Count the {t} per {a}, most first.", "SELECT {a}, COUNT(*) FROM {t} GROUP BY {a} ORDER BY COUNT(*) DESC"),
    ("Set {n} to {x} where {a} is {v}.", "UPDATE {t} SET {n} = {x} WHERE {a} = '{v}'"),
    ("Remove all {t} with {n} under {x}.", "DELETE FROM {t} WHERE {n} < {x}"),
    ("I need the {a} of {t} with {n} between {x} and {y}.", "SELECT {a} FROM {t} WHERE {n} BETWEEN {x} AND {y}"),
    ("What's the smallest and the largest {n}?", "SELECT MIN({n}), MAX({n}) FROM {t}"),
    ("Whose {a} starts with {l}?", "SELECT * FROM {t} WHERE {a} LIKE '{l}%'"),
    ("{t} without a {a}", "SELECT * FROM {t} WHERE {a} IS NULL"),
]


def _queries(draw: random.Random) -> Iterator[dict]:
    tables = [re.split(": | / ", line) for line in TABLES.split("\n") if line]
    while True:
        table, *kinds = draw.choice(tables)
        texts, numbers = (columns.split() for columns in kinds)
        columns = draw.sample(texts, 3) + draw.sample(numbers, 2)
        draw.shuffle(columns)
        a, b = draw.sample([c for c in columns if c in texts], 2)
        n = draw.choice([c for c in columns if c in numbers])
        x = draw.randint(2, 400)
        asked = {"t": table, "a": a, "b": b, "n": n, "v": draw.choice(VALUES), "x": x, "y": x + draw.randint(3, 90)}
        asked |= {"k": draw.randint(2, 12), "l": draw.choice("ABCDEHKLMPRST")}
        question, query = draw.choice(QUERIES)
        text = f"{table}({', '.join(columns)})\n{question.format(**asked)}"
        yield {"text": text, "answer": query.format(**asked) + ";"}


# 5. to 8. -----------------------------------------------------------------------------------------


WHO = {
    "i": {"i", "my", "me", "we", "our", "us"},
    "he": {"he", "his", "him", "himself"},
    "she": {"she", "her", "hers", "herself"},
    "you": {"you", "your", "yours"},
}


def _who(examples: list[str]) -> Iterator[dict]:
    """As many of each label; sentences that hold the words of one alone."""
    of: dict[str, list[dict]] = {who: [] for who in LABELS}
    for text in examples:
        words = set(re.findall(r"[a-z]+", text.lower()))
        if len(found := [who for who, of_it in WHO.items() if words & of_it]) == 1:
            of[found[0]].append({"text": text, "label": LABELS[found[0]]})
    return (row for rows in zip(*of.values()) for row in rows)


def _tagged(fact: str) -> dict | None:
    """The three longest words, in the order in which they stand."""
    words = list(dict.fromkeys(word.lower() for word in re.findall(r"[A-Za-z]{5,}", fact)))
    if len(words) < 4:
        return None
    longest = sorted(words, key=lambda word: (-len(word), words.index(word)))[:3]
    return {"text": fact, "answer": " ".join(f"#{word}" for word in words if word in longest)}


def _halved(fact: str) -> dict:
    words = fact.split()
    middle = len(words) // 2
    return {"text": " ".join(words[:middle]), "answer": " ".join(words[middle:])}


def _draft(text: str, draw: random.Random) -> dict | None:
    """A sentence with two or three mistakes in it, which ends with a period when corrected."""
    words = text.split()
    if not 6 <= len(words) <= 16:
        return None
    draft = [words[0][0].lower() + words[0][1:], *words[1:]]
    for mistake in draw.sample(MISTAKES, len(MISTAKES)):
        if draft != (draft := mistake(draft, draw)) and draw.random() < 0.4:
            break
    return {"text": " ".join(draft), "answer": f"{text}."}


def _swapped(words: list[str], draw: random.Random) -> list[str]:
    at = [i for i, word in enumerate(words) if word.isalpha() and len(word) > 4]
    if not at:
        return words
    i = draw.choice(at)
    j = draw.randrange(1, len(words[i]) - 2)
    word = words[i][:j] + words[i][j + 1] + words[i][j] + words[i][j + 2 :]
    return [*words[:i], word, *words[i + 1 :]]


def _doubled(words: list[str], draw: random.Random) -> list[str]:
    i = draw.randrange(len(words))
    return [*words[: i + 1], *words[i:]]


def _changed(pairs: dict[str, str]) -> Callable[[list[str], random.Random], list[str]]:
    def change(words: list[str], draw: random.Random) -> list[str]:
        at = [i for i, word in enumerate(words) if word in pairs]
        if not at:
            return words
        i = draw.choice(at)
        return [*words[:i], *([pairs[words[i]]] if pairs[words[i]] else []), *words[i + 1 :]]

    return change


MISTAKES: list[Callable[[list[str], random.Random], list[str]]] = [
    _swapped,
    _doubled,
    _changed({"is": "are", "are": "is", "was": "were", "were": "was", "has": "have", "have": "has"}),
    _changed({"the": "", "a": "", "an": ""}),
    _changed({"a": "an", "an": "a", "their": "there", "its": "it's", "too": "to", "than": "then", "his": "he's"}),
    _changed({"he": "him", "she": "her", "they": "them", "I": "me", "him": "he", "them": "they", "her": "she"}),
]
