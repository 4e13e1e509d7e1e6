"""Motion captions for index files: the verbs of a text with their subjects and objects.

    python -m apps.captions data/hawk     # adds "motion" to the rows of train.jsonl and test.jsonl without it

In stage 1 the motion tokens alone are asked to say what moves: "car swerves lane, hits van". As in the
released code, the captions are taken from spaCy's parse, if spaCy and its small English model are installed.
Otherwise rules make them: a list of common words shows where a noun phrase ends; a list of verbs, and the
words around a word, show whether it is a verb. The field "motion_by" of a row says which: "spacy" or "rules".

In this file: spaCy; word lists; Reader, which goes through a text word by word; index files and the command.
"""

import json
import os
import re
from codecs import BOM_UTF8
from collections import Counter
from functools import cache
from pathlib import Path

from tqdm import tqdm

from apps import run_program
from apps.scores import lock
from data import check_row
from sample import make_parser, note, print_error

# ------------------------------------------------------------------------------------------------------------
# spaCy, where it is installed


@cache
def spacy_model():
    """spaCy's small English model, or None where it is not installed."""
    try:
        import spacy

        return spacy.load("en_core_web_sm")
    except (ImportError, OSError):
        return None


def spacy_motion(parse):
    """The motion caption of a parsed text, as in the released code: verbs with their subjects and objects."""

    def objects(word):
        for child in word.children:
            if child.dep_ in ("dobj", "obj", "pobj"):
                yield child.text
            elif child.dep_ in ("prep", "agent", "dative"):  # an object may also follow a preposition
                yield from objects(child)

    groups = []
    for verb in parse:
        if verb.pos_ == "VERB" and verb.dep_ not in ("amod", "compound"):
            subjects = [child.text for child in verb.children if child.dep_ in ("nsubj", "nsubjpass")]
            groups.append(" ".join([*subjects, verb.text, *objects(verb)]))
    return ", ".join(groups)


# ------------------------------------------------------------------------------------------------------------
# Word lists

# Words that are neither a verb nor the head of a noun phrase, by kind. "noun": nouns that look like verbs.
# A link may join two verbs of one subject ("swerves and hits"); a break always begins a new clause.
GRAMMAR = {
    "determiner":
        "a an the this these those his her its their each every both some any no another several many few "
        "two three four five six all other",
    "pronoun":
        "he she it they him them we us someone everyone nobody nothing something himself herself themselves",
    "preposition":
        "in on at into onto to from with without by of off out over under through across along around near "
        "behind beside between against toward towards past down up for during inside outside above below "
        "among about like",
    "link": "and or but then , who which that",
    "break": "while as when because after before so until since although though if whereas where . ; : ! ?",
    "auxiliary":
        "is are was were be been being am has have had do does did will would can could may might must "
        "should",
    "adverb":
        "not just still almost also very too there here apart away aside ahead back left forward backward "
        "backwards sideways together again",
    "noun":
        "building morning evening railing ceiling clothing anything everything thing ring string parking "
        "oncoming bed red",
}  # fmt: skip
KIND_OF = {word: kind for kind, words in GRAMMAR.items() for word in words.split()}

# Irregular past forms, and the base forms of verbs that descriptions of events use
# fmt: off
PAST = set("""
    began begun bent bit broke broken brought burst came caught cut drew drawn drove driven ate fell fallen
    fled flew fought gave got went gone grew held hid hit hurt kept laid lay led left lost made met put ran
    rang rode ridden rose sat saw seen shook shot slept slid spun stole stolen stood struck stuck swung took
    taken threw thrown tore torn wore wove
""".split())
BASE = set("""
    aim appear approach argue arrive attack attempt avoid beat begin bend block brake break bring bump burn
    carry catch cause change chase climb close collapse collide come continue crash crawl cross cut cycle
    damage dance dash disappear drag draw drift drive drop eat emerge enter erupt escape exit explode fail
    fall fight flee flip fly follow force gather get give go grab happen help hide hit hold hurt jump keep
    kick knock lean leave lie lift linger loiter look lose make merge move narrow occur open overtake overturn
    park pass pick pin play point pull punch push put raise react reach remain reverse ride rise roll run rush
    scatter see seem shatter shoot shout shove show sit skate skid slam slide slip slow speed spill spin spray
    sprint stagger stand start stay steal step stop strike struggle stumble surround swerve swing take talk
    throw tip topple touch travel trip try turn use veer wait walk watch wave yield
""".split())
# fmt: on
PLURAL_ENDINGS = ("s", "people", "men", "police", "children", "they")
OPENS_OBJECT = ("determiner", "pronoun")  # what such a word follows may be a verb: "hits a", "hits him"


def word_kind(word):
    """A key of GRAMMAR, or None for a verb or noun that is in no list."""
    if word in KIND_OF:
        return KIND_OF[word]
    return "adverb" if word.endswith("ly") else None


# ------------------------------------------------------------------------------------------------------------
# Reading a text


class Reader:
    """Goes through a text word by word and collects its clauses, each a list: subject, verb, objects.

    A noun phrase ("a white car") ends at a verb or at a word of GRAMMAR; its last word, the head, stands for
    it. What happens to the head depends on the role of the phrase in its clause:

        subject      before the verb: it waits for the verb
        object       after the verb, or after a preposition that follows the verb
        aside        "of a store", or a phrase with a preposition before the subject: left out
        complement   after "is": left out, unless it turns out to be the subject of a verb
    """

    def __init__(self):
        self.clauses = []
        self.subject = ""  # waits for its verb
        self.head = ""  # the latest word of the noun phrase that is being read; empty between phrases
        self.role = "subject"  # of that noun phrase
        self.has_verb = False  # the clause has its verb
        self.after_and = False  # the noun phrase is joined to another by "and", which makes a plural
        self.after_determiner = False  # so a noun must follow, perhaps after "parked" or "passing"
        self.previous_word = "."
        self.previous_kind = "break"

    def read(self, word, next_word):
        lower = word.lower()
        kind = self.kind(lower, next_word.lower())
        in_phrase = kind in (None, "noun") or (kind == "adverb" and self.after_determiner)
        if in_phrase:
            if self.previous_kind != "pronoun":  # a pronoun is a whole phrase
                self.head = word
            self.after_determiner = self.after_determiner and lower.endswith(("ed", "ing"))
        elif kind != "adverb":
            self.end_phrase(kind)
            self.start(word, kind)
        self.previous_word = lower
        self.previous_kind = kind

    def kind(self, word, next_word):
        """The kind of a word in its context: "verb", a key of GRAMMAR, or None for a noun or adjective."""
        kind = word_kind(word)
        left_something = word == "left" and word_kind(next_word) == "determiner"  # "left" may be an adverb
        if self.after_determiner or not (kind is None or left_something):
            return kind
        return "verb" if self.is_verb(word, word_kind(next_word)) else None

    def is_verb(self, word, next_kind):
        """Whether a word is a verb, judged by its form, the words beside it and its possible subject."""
        noun = (self.head or self.subject).lower()
        if self.previous_word == "to":
            return word in BASE or next_kind in OPENS_OBJECT
        if word in PAST or word.endswith("ed"):
            if self.previous_kind == "preposition":  # "with raised arms"
                return False
            return bool(noun) or self.previous_kind in ("auxiliary", "link", "verb")
        if word.endswith("ing"):
            return True
        # The present tense needs a subject, or "and" in place of one. Before an auxiliary a word is a noun.
        has_subject = bool(noun) or self.previous_kind == "link"
        finite = has_subject and self.role != "object" and next_kind != "auxiliary"
        if word.endswith("s"):
            bases = {word[:-1], word[:-2], word[:-3] + "y"}  # hits, crashes, carries
            return finite and (bool(bases & BASE) or next_kind in OPENS_OBJECT)
        plural = self.after_and or noun.endswith(PLURAL_ENDINGS)
        return word in BASE and (self.previous_kind == "auxiliary" or (finite and plural))

    def end_phrase(self, kind):
        """Puts the head where its role requires. kind: that of the word that ends the phrase."""
        if not self.head:
            return
        if self.role == "object":
            self.clauses[-1].append(self.head)
        elif self.role == "aside":
            if not self.subject and not self.has_verb:
                self.role = "subject"  # of the next phrase: "In the video, a car …"
        elif self.role == "subject":
            self.subject = self.subject or self.head
        else:  # a complement that a verb follows is its subject: "there is a man running"
            self.subject = self.head if kind == "verb" else ""

    def start(self, word, kind):
        """What a word outside noun phrases means for the words that follow it."""
        self.head = word if kind == "pronoun" else ""
        self.after_determiner = kind == "determiner"
        if kind == "verb":
            self.clauses.append([self.subject, word] if self.subject else [word])
            self.subject = ""
            self.role = "object"
            self.has_verb = True
            self.after_and = False
        elif kind == "preposition":
            belongs_to_verb = word.lower() != "of" or self.previous_kind == "preposition"  # "out of the way"
            self.role = "object" if self.has_verb and belongs_to_verb else "aside"
        elif kind == "auxiliary":
            self.role = "complement"
        elif kind == "break" or (kind == "link" and (self.has_verb or word == ",")):  # a new clause
            if kind == "break" or self.has_verb:
                self.subject = ""
            self.role = "subject"
            self.has_verb = False
        if kind in ("link", "break"):
            self.after_and = word.lower() == "and"


def motion_by_rules(text):
    """The motion caption of a text: clauses of subject, verb and objects, joined by commas."""
    words = [*re.findall(r"\w[\w'’-]*|[.,;:!?]", text), "."]
    reader = Reader()
    for word, next_word in zip(words, [*words[1:], "."], strict=True):
        reader.read(word, next_word)
    return ", ".join(" ".join(clause) for clause in reader.clauses)


# ------------------------------------------------------------------------------------------------------------
# Index files

NAMES = {"spacy": "spaCy", "rules": "rules"}  # as notes call what makes captions


def caption_line(line, done=b""):
    """One line of an index file (bytes) -> (the line with a motion caption, what made the caption, or None if
    it had one already). done: what an interrupted run may have made of the line; its caption is kept."""
    if not line.strip():
        return line, None
    row = check_row(json.loads(line))
    if row.get("motion") is not None:
        return line, None
    row |= kept_caption(row, done) or caption(row)
    return json.dumps(row).encode() + b"\n", row["motion_by"]


def kept_caption(row, line):
    """The fields that the line adds to the row, {} if it is not of this row, or half-written."""
    try:
        done = json.loads(line)
        fields = {name: done[name] for name in ("motion", "motion_by")}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return fields if done == row | fields else {}


def caption(row):
    """The fields "motion" and "motion_by" of a row that has none."""
    answers = [turn["a"] for turn in row.get("qa") or ()]
    texts = (row.get("description") or "", *answers)
    text = next(text for text in texts if text.strip())  # check_row made sure that there is one
    if spacy_model():
        return {"motion": spacy_motion(spacy_model()(text)), "motion_by": "spacy"}
    return {"motion": motion_by_rules(text), "motion_by": "rules"}


def caption_index(file):
    """Adds captions to one index file and replaces it atomically. Rows that have one stay as they are.

    It goes line by line, because an index may not fit into memory. What an interrupted run has written is
    beside the index: its lines are kept up to the first that does not match the index as it is now.
    """
    temporary = Path(f"{file}.tmp")
    rows = 0
    made = Counter()  # {"spacy" or "rules": captions}
    empty = 0  # of these
    with temporary.open("ab+") as out:
        lock(out)
        out.seek(0)
        end = 0  # of the lines in it that match the index
        resuming = True
        with file.open("rb") as lines, progress(file) as bar:
            if lines.read(len(BOM_UTF8)) != BOM_UTF8:
                lines.seek(0)
            for number, line in enumerate(lines, 1):
                bar.update(len(line))
                done = out.readline() if resuming else b""
                try:
                    line, by = caption_line(line, done)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{file}, line {number}: {error}") from None
                rows += bool(line.strip())
                made.update([by] if by else [])
                empty += bool(by) and not json.loads(line)["motion"]
                if resuming and line != done:
                    resuming = False
                    cut(out, end)
                if not resuming:
                    out.write(line)
                end += len(line)
        cut(out, end)
        if made:
            os.replace(temporary, file)
        else:
            temporary.unlink(missing_ok=True)
    by_what = ", ".join(f"{count} by {NAMES[by]}" for by, count in made.items())
    added = f"{made.total()} of them received a motion caption"
    note(f"{file}: {rows} rows, {added}" + f" ({by_what})" * bool(made))
    if empty:
        note(f"note: {empty} of these captions are empty: no verb was found (the rules are for English)")


def progress(file):
    options = {"unit": "B", "unit_scale": True, "leave": False, "delay": 1}
    return tqdm(total=file.stat().st_size, desc=file.name, **options)


def cut(file, end):
    """Truncates the file at `end`, where writing continues."""
    file.seek(end)
    file.truncate()


def parse_args(argv):
    parser = make_parser(__doc__)
    told = "folder with train.jsonl, test.jsonl or both; or an index file"
    parser.add_argument("data", type=Path, metavar="DIR", help=told)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    files = [args.data / "train.jsonl", args.data / "test.jsonl"]
    files = [args.data] if args.data.is_file() else [file for file in files if file.exists()]
    try:
        if not files:
            raise ValueError(f"{args.data}: has no train.jsonl or test.jsonl; `prepare.py hawk` writes them")
        for file in files:
            caption_index(file)
    except (OSError, ValueError) as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    run_program(main)
