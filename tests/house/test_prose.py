"""Pages are for a plant engineer who reads English as a second language: short sentences, plain words, short lines."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = [ROOT / name for name in NAMES if (ROOT / name).is_file()] + sorted((ROOT / "docs").glob("*.md"))
page_by_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])

MAX_WORDS = 35
MAX_COLUMNS = 100

# Each phrase stood in a page once and stopped a reader: an idiom that no dictionary explains, a metaphor in place of the
# field's term, a passive that hides the actor, or a word that means something else in federated learning or in a plant
# ("twin": digital twin). Code spans, fenced blocks and "(older name: ...)" are exempt,
# because a page may still quote the older name of a key.
BANNED = {
    # passives that hide the actor: write "the log reports", "the server raises"
    r"(?i)\b(?:is|are|was|were|be|been) told\b": "reported, logged or raised",
    r"(?i)\b(?:is|are|was|were|be|been) said\b": "reported, logged or raised",
    r"(?i)\b(?:is|are|was|were) named\b": "the report names ..., the error names ...",
    r"(?i)\bis there once\b": "appears once",
    r"(?i)\bsa(?:ys|id) (?:so|once)\b": "reports it, reported once",
    # clauses as subjects: a sentence starts with the thing that acts
    r"^Who(?:ever)? [^?]*$": "the site that ..., the side that ...",
    r"^What [^?]*$": "the thing's name",
    r"(?i)\bknows the key is newer\b": "the side that knows the field is newer",
    # metaphors and idioms in place of terms
    r"(?i)\bthe doors?\b": "egress filter",
    r"(?i)\bis of then\b": "restores the past",
    r"(?i)\bwelcome again\b": "accepted again",
    r"(?i)\bwork(?:ed|s|ing)? against\b": "oppose, conflict with",
    r"(?i)\bsqueezed through\b": "bottleneck",
    r"(?i)\bas odd\b": "as anomalous",
    r"(?i)\bends nothing\b": "does not stop the daemon",
    r"(?i)\bthat they turn\b": "watchdog",
    r"(?i)\btells? systemd\b": "supports systemd's notifications",
    r"\bAs it came\b|\bas it came\b": "without model selection",
    r"(?i)\bcall(?:ed|s)? in\b": "connect",
    r"(?i)\b(?:takes?|taken|took) (?:it|them) home\b": "install, copy to the plant",
    r"(?i)\bin vain\b": "without success",
    r"(?i)\bparcels?\b|\bdesks?\b": "message, serialiser",
    # words that mean something else to the reader
    r"(?i)\b(?<!digital )twins?\b": "local baseline",
    r"(?i)\bliars?\b": "Byzantine sites",
    r"(?i)\b(?:may|that|who|nobody|and|or) lies?\b(?! (?:in|at|on|within|outside|beside|below|between|under)\b)": "attack",
    r"(?i)\bhighways?\b(?! of LSTNet)": "skip channels",
    r"(?i)\bcrowds?\b": "vectorized sites",
    r"(?i)\bthe cent(?:re|er)(?:'s)?(?! of\b)": "the server",
}  # fmt: skip


class Sentence(NamedTuple):
    line: int
    text: str

    @property
    def words(self) -> int:
        """A code span is one word; a sign that stands alone is none."""
        return sum(any(letter.isalnum() for letter in word) for word in mask_code_spans(self.text).split())


def mask_code_spans(text: str) -> str:
    """Code spans lose blanks and full stops, so that they neither end a sentence nor count as several words."""
    return re.sub(r"`[^`]*`", lambda span: "`" + re.sub(r"[^\w`]", "_", span[0][1:-1]) + "`", text)


def split_blocks(text: str) -> Iterator[list[tuple[int, str]]]:
    """The lines, with their numbers, of each paragraph, list item and table cell; fences and headings are left out."""
    block: list[tuple[int, str]] = []
    fenced = False
    for line_number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip().removeprefix("> ")
        if line.startswith("```"):
            fenced = not fenced
        item = re.match(r"(?:[-*+]|\d+\.) +", line)
        table = line.startswith("|")
        alone = not line or line.startswith(("#", "```", "<!--")) or re.match(r"\[[^\]]+\]: ", line)
        if block and (fenced or item or table or alone):
            yield block
            block = []
        if fenced or alone:
            continue
        if table:
            cells = re.split(r"(?<!\\)\|", line.strip("|"))
            yield from ([(line_number, cell.strip())] for cell in cells if set(cell) - set(" :-"))
        else:
            block.append((line_number, line[item.end() :] if item else line))
    if block:
        yield block


def split_sentences(text: str) -> Iterator[Sentence]:
    """Each sentence with the line that it begins on; link targets are dropped, link texts stay."""
    for block in split_blocks(text):
        joined, starts = "", []
        for line_number, line in block:
            starts.append((len(joined), line_number))
            joined += re.sub(r"\]\([^)\s]*\)", "]", line) + " "
        hidden = re.sub(r"`[^`]*`", lambda span: "`" * len(span[0]), joined)
        hidden = re.sub(r"\b(?:et al|e\.g|i\.e|cf|vs|approx)\.", lambda short: short[0][:-1] + ",", hidden)
        begin = 0
        for end in [stop.end() for stop in re.finditer(r"[.!?][\"')\]*_]*\s+", hidden)] + [len(joined)]:
            if sentence := joined[begin:end].strip():
                yield Sentence([line_number for start, line_number in starts if start <= begin][-1], sentence)
            begin = end


def find_long_sentences(text: str) -> list[str]:
    return [
        f"line {sentence.line}: {sentence.words} words, at most {MAX_WORDS}: {sentence.text}"
        for sentence in split_sentences(text)
        if sentence.words > MAX_WORDS
    ]


def strip_exempt(sentence: str) -> str:
    """The sentence without code spans, older names and the marks around it."""
    return re.sub(r"(?i)\(?\bolder (?:name|word)s?: [^).]*\)?", "", re.sub(r"`[^`]*`", "`", sentence)).strip('*"( ')


def find_banned(text: str) -> list[str]:
    return [
        f"line {sentence.line}: {match[0][:40]!r}; write {remedy!r}: {sentence.text}"
        for sentence in split_sentences(text)
        for pattern, remedy in BANNED.items()
        if (match := re.search(pattern, strip_exempt(sentence.text)))
    ]


def find_wide_lines(text: str) -> list[str]:
    """Lines over the margin; tables, fences and headings cannot wrap, and a link's target does not count."""
    prose = {line_number for block in split_blocks(text) for line_number, _ in block}
    wide = []
    for line_number, line in enumerate(text.splitlines(), start=1):
        columns = len(re.sub(r"\]\([^)\s]*\)|https?://\S+", "]", line))
        if line_number in prose and not line.lstrip().startswith("|") and columns > MAX_COLUMNS:
            wide.append(f"line {line_number}: {columns} columns, at most {MAX_COLUMNS}: {line}")
    return wide


def list_faults(page: Path, faults: list[str]) -> str:
    return "\n".join(f"{page.relative_to(ROOT)}, {fault}" for fault in faults)


@page_by_page
def test_no_sentence_is_longer_than_a_reader_can_hold(page: Path) -> None:
    faults = find_long_sentences(page.read_text())
    assert not faults, "Split each of these into two sentences:\n" + list_faults(page, faults)


@page_by_page
def test_no_phrase_needs_a_native_speaker(page: Path) -> None:
    faults = find_banned(page.read_text())
    assert not faults, "Write these in the field's words:\n" + list_faults(page, faults)


@page_by_page
def test_prose_wraps(page: Path) -> None:
    faults = find_wide_lines(page.read_text())
    assert not faults, "Wrap these lines:\n" + list_faults(page, faults)


SAMPLE = """# A heading of a page is no sentence. It may be long.

First sentence (Li et al. 2020) of `a.b = 1. Not an end`. Second one
goes on [over a line](https://example.com/a.b.c). **Bold end.** Last

- an item
  on two lines. Its second sentence
1. a numbered item
```
A fence. With sentences.
```
| key | One. Two |
|---|---|
"""


def test_a_page_is_split_into_sentences() -> None:
    assert [tuple(sentence) for sentence in split_sentences(SAMPLE)] == [
        (3, "First sentence (Li et al. 2020) of `a.b = 1. Not an end`."),
        (3, "Second one goes on [over a line]."),
        (4, "**Bold end.**"),
        (4, "Last"),
        (6, "an item on two lines."),
        (7, "Its second sentence"),
        (8, "a numbered item"),
        (12, "key"),
        (12, "One."),
        (12, "Two"),
    ]
    assert [sentence.words for sentence in split_sentences(SAMPLE)][:2] == [8, 7]


def test_a_long_sentence_is_reported_with_line_and_count() -> None:
    assert find_long_sentences(f"# Title\n\nShort.\n\nA {'word ' * 34}`and some code`.\n") == [
        f"line 5: 36 words, at most 35: A {'word ' * 34}`and some code`."
    ]
    assert find_long_sentences(f"A {'word ' * 33}`and some code`.\n") == []


@pytest.mark.parametrize(
    "sentence",
    [
        "A full disk ends nothing and is said once.",
        "Daemons tell systemd when they serve and that they turn.",
        "What the gateway refuses is there once a minute and cause.",
        "**It is of then, not of now.**",
        "A site that was revoked since is welcome again.",
        "Who knows the key is newer.",
        "how many numbers a sample is squeezed through; fewer see more as odd",
        "no site's update is worked against",
        "As it came, federation clearly helps in 2 of 8.",
        "Every reply is checked at the door.",
        "The local twin does the same.",
        "a few sites may lie",
        "The site is told and is named.",
    ],
)
def test_a_phrase_that_stopped_a_reader_is_found(sentence: str) -> None:
    assert find_banned(f"A paragraph.\n\n{sentence}\n")


def test_plain_sentences_pass() -> None:
    plain = (
        "Who may sign a release? The rows lie in `the door`. The older key is `hostile_share`.\n"
        "A digital twin is something else. The report names the site. A local baseline (older name: twin) trains alone.\n"
    )
    assert find_banned(plain) == []


def test_a_wide_line_is_found_unless_a_link_or_a_table_makes_it_wide() -> None:
    words = "word " * 25
    assert find_wide_lines(f"{words}\n\n| {words} |\n\n# {words}\n\n[a](https://example.com/{'x' * 100})\n") == [
        f"line 1: 125 columns, at most 100: {words}"
    ]
