"""Duplicate documents: exact, by the hash of the normalised text, and near, by MinHash.

Documents are numbered in the order of the inputs, validation first, and the first of several stays. Decisions are made
from files of hashes, after all documents were read once and before any is tokenised.

Exact: 16 bytes a document on disk; memory stays below a fixed bound, because hashes are sorted one range at a time.
Near: MinHash signatures (rensa, 128 permutations, fixed seed) over the sets of five consecutive words, or characters
where a script puts no spaces between words (Chinese, Japanese, Thai and others); candidates by
bands of the signature (locality sensitive hashing), sorted one band at a time. A document is a near duplicate if the
estimate of its Jaccard similarity with any document before it reaches the threshold. 512 bytes a document on disk,
about 50 in memory.
"""

import functools
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from rensa import RMinHash

SORTED_AT_ONCE = 1 << 21  # hashes: about 150 MB while they are sorted
READ_AT_ONCE = 1 << 20
PERMUTATIONS = 128
SEED = 1236
SHINGLE_WORDS = 5
DETECTION = 0.99  # least chance that two documents just at the threshold share a band
DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])
SCRIPT_CHARACTERS = 2000


# What other spellings of the same character are written as. Other compatibility characters stay: NFKC would make 23 of
# 2³, 31/2 of 3½, and one letter of a bold one and a plain one.
SAME_CHARACTER = ("<wide>", "<narrow>", "<noBreak>", "<initial>", "<medial>", "<final>", "<isolated>", "<vertical>")
SPELLINGS = {
    code: unicodedata.normalize("NFKC", chr(code))
    for code in range(0xA0, 0x10000)
    if unicodedata.decomposition(chr(code)).startswith(SAME_CHARACTER) or 0xFB00 <= code <= 0xFB06  # ligatures: fi, st
}
CAPITALISED = re.compile(  # but no unit: 5 Mg are not 5 mg
    r"(?<![^\W_])(?<!\d )[A-ZÀ-ÖØ-ÞΑ-ΩА-Я](?=[a-zß-öø-ÿα-ωа-я]+(?![^\W\d_]))"
)
# Characters of scripts that are written without spaces between words.
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\u3005-\u3007\u3021-\u3029\u3040-\u312f\u31a0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua48f\ua980-\ua9ff\uaa60-\uaadf\uf900-\ufaff\U00016fe0-\U00018cff\U0001b000-\U0001b2ff"
    "\U00020000-\U0003ffff"
)
UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")
UNITS = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


def normalised(text: str) -> str:
    """Text in which documents are compared: case folded, each run of white space one space, full width as half."""
    return _spelled(text).casefold()


def nearly_as_written(text: str) -> str:
    """Text in which questions are compared: as `normalised`, but symbols keep their case (X and x, AB and ab).

    Only a word written with one capital, its first letter, is written small, and not after a number.
    """
    return CAPITALISED.sub(lambda match: match[0].lower(), _spelled(text))


def _spelled(text: str) -> str:
    if not unicodedata.is_normalized("NFKC", text):
        text = unicodedata.normalize("NFC", text.translate(SPELLINGS))
    return " ".join(text.split())


def digest(normal: str) -> bytes:
    """128 bits of SHA-256 of a normalised text."""
    return hashlib.sha256(normal.encode("utf-8")).digest()[:16]


def first_occurrences(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The repeated documents and the first document equal to each; `digests` is DIGEST [documents], may be on disk.

    Returns two int64 arrays of equal length.
    """
    ranges = -(-digests.size // SORTED_AT_ONCE)
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int64),) * 2]
    for number in range(ranges):
        low, high = (min(int(edge * 2**64 / ranges), 2**64 - 1) for edge in (number, number + 1))
        found.append(_repeats(*_in_range(digests, low, None if number == ranges - 1 else high)))
    repeats, firsts = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return repeats, firsts


def _in_range(digests: np.ndarray, low: int, high: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and digests of the documents whose digest lies in [low, high)."""
    numbers, kept = [], []
    for start in range(0, digests.size, READ_AT_ONCE):
        piece = np.asarray(digests[start : start + READ_AT_ONCE])
        inside = piece["high"] >= np.uint64(low)
        if high is not None:
            inside &= piece["high"] < np.uint64(high)
        chosen = np.flatnonzero(inside)
        numbers.append(chosen + start)
        kept.append(piece[chosen])
    return np.concatenate(numbers), np.concatenate(kept)


def _repeats(numbers: np.ndarray, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the documents `numbers`, in ascending order: those with an equal before them, and the first such."""
    order = np.lexsort((numbers, digests["low"], digests["high"]))
    numbers, digests = numbers[order], digests[order]
    repeated = np.zeros(numbers.size, bool)
    repeated[1:] = digests[1:] == digests[:-1]
    starts = np.flatnonzero(~repeated)
    firsts = numbers[starts[np.searchsorted(starts, np.arange(numbers.size), side="right") - 1]]
    return numbers[repeated], firsts[repeated]


def signatures(normal_texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures: uint32 [texts, PERMUTATIONS]. Documents of fewer words than a shingle are one shingle."""
    sets = []
    for text in normal_texts:
        words = UNITS.findall(text) if UNSPACED_CHARACTER.search(text) else text.split(" ")
        sets.append([" ".join(words[at : at + SHINGLE_WORDS]) for at in range(max(1, len(words) - SHINGLE_WORDS + 1))])
    rows = RMinHash.digests_from_token_sets(sets, PERMUTATIONS, SEED)
    return np.array(rows, np.uint32).reshape(len(sets), PERMUTATIONS)


def rows_for(threshold: float) -> int:
    """The most values in a band with which documents at the threshold still share a band with a chance of DETECTION."""
    for rows in (16, 8, 4, 2):
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= DETECTION:
            return rows
    return 1


def near_duplicates(signatures: np.ndarray, chosen: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Of the documents `chosen` (int64, ascending): those with a near duplicate before them, and the first such.

    `signatures` is uint32 [documents, PERMUTATIONS], may be on disk. Candidates share a band, a run of values of the
    signature; in each band a document is compared with the first and with the last before it that has the same band.
    """
    rows = rows_for(threshold)
    firsts = np.full(chosen.size, chosen.size, np.int64)  # as positions in `chosen`; the size means none
    for start in range(0, PERMUTATIONS, rows):
        for later, earlier in _candidates(_band_keys(signatures, chosen, start, rows)):
            for at in range(0, later.size, READ_AT_ONCE // PERMUTATIONS):
                piece = slice(at, at + READ_AT_ONCE // PERMUTATIONS)
                pairs = signatures[chosen[later[piece]]] == signatures[chosen[earlier[piece]]]
                similar = pairs.mean(axis=1) >= threshold
                np.minimum.at(firsts, later[piece][similar], earlier[piece][similar])
    found = np.flatnonzero(firsts < chosen.size)
    return chosen[found], chosen[firsts[found]]


def _band_keys(signatures: np.ndarray, chosen: np.ndarray, start: int, rows: int) -> np.ndarray:
    """One number for each document's values `start` to `start + rows`: uint64 [chosen]."""
    keys = np.zeros(chosen.size, np.uint64)
    for at in range(0, chosen.size, READ_AT_ONCE):
        piece = slice(at, at + READ_AT_ONCE)
        for column in range(start, start + rows):
            keys[piece] = keys[piece] * np.uint64(0x9E3779B97F4A7C15) + signatures[chosen[piece], column]
    return keys


def _candidates(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of documents with an equal key before them, with the first such and with the last such."""
    order = np.argsort(keys, kind="stable")
    repeated = np.zeros(keys.size, bool)
    repeated[1:] = keys[order[1:]] == keys[order[:-1]]
    at = np.flatnonzero(repeated)
    starts = np.flatnonzero(~repeated)
    yield order[at], order[starts[np.searchsorted(starts, at, side="right") - 1]]
    yield order[at], order[at - 1]


def script_of(text: str) -> str:
    """The writing system of most letters among the first SCRIPT_CHARACTERS, as Unicode names it: LATIN, CJK, ...

    The first word of each letter's Unicode name; "none" for a text without letters. A script is not a language: LATIN
    is English as well as Vietnamese.
    """
    scripts = Counter(_script(character) for character in text[:SCRIPT_CHARACTERS])
    scripts.pop(None, None)
    return min(scripts, key=lambda script: (-scripts[script], script), default="none")


@functools.lru_cache(maxsize=1 << 16)
def _script(character: str) -> str | None:
    return unicodedata.name(character, "UNKNOWN").split()[0] if character.isalpha() else None
