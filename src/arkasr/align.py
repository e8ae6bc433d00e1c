"""When each word was said: from what the decoder listened to, and the loudness of the audio. numpy only.

    text + ids -> words and their tokens -> attention [words, steps of 20 ms] + loudness -> the best places, in order

Unusual: no second model and no dynamic time warping. Between any two words there may be a pause of any length, so a
word has a begin and an end of its own, and one pass over the words finds the best of all ways to place them.
"""

import codecs
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from arkasr import audio, results
from arkasr.audio import HOP_SAMPLES, SAMPLE_RATE, Waveform

STEP_SAMPLES = 2 * HOP_SAMPLES  # 20 ms, a frame of the encoder
# Chosen with `tiny` on digits of FSDD said in a row: see "Word times" in docs/transcribing.md.
LISTENED = 0.03  # attention to an audio token above which it speaks for the word
RANGE_DB, ABOVE_DB = 35.0, 6.0  # loud is what is less than the one below the peak, and the other above the quietest
FULL_DB = 20.0  # so much above or below that is as loud, or quiet, as counts
LOUD_WORD, QUIET_EDGE = 4.0, 3.0  # what a loud step in a word counts, and a quiet one on either side of its edge
_DECIBEL = math.log(10) / 10

Floats = npt.NDArray[np.float64]


def words(text: str, ids: Sequence[int], token_bytes: Callable[[int], bytes]) -> list[tuple[str, tuple[int, ...]]]:
    """The words of a text, as `results.words` has them, each with the places of its tokens in `ids`.

    They are found in order in what the tokens spell; tokens that spell other things, such as leading punctuation that
    was dropped, belong to no word, and a word that is not spelled has no tokens. Neighbours may share one.
    """
    spelled, owners = _spelled(ids, token_bytes)
    found: list[tuple[str, tuple[int, ...]]] = []
    position = 0
    for word in results.words(text):
        at = spelled.find(word, position)
        if at < 0:
            found.append((word, ()))
            continue
        position = at + len(word)
        found.append((word, tuple(range(owners[at][0], owners[position - 1][1] + 1))))
    return found


def _spelled(ids: Sequence[int], token_bytes: Callable[[int], bytes]) -> tuple[str, list[tuple[int, int]]]:
    """What tokens spell, and of each character the first and the last token that have bytes of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    spelled: list[str] = []
    owners: list[tuple[int, int]] = []
    begun: int | None = None  # the token that has the first byte of an unfinished character
    for place, token_id in enumerate(ids):
        for byte in token_bytes(token_id):
            characters = decoder.decode(bytes([byte]))
            owners += [(place if begun is None else begun, place)] * len(characters)
            spelled.append(characters)
            unfinished = bool(decoder.getstate()[0])
            begun = None if not unfinished else place if characters or begun is None else begun
    unfinished_at_end = decoder.decode(b"", final=True)
    if begun is not None:
        owners += [(begun, len(ids) - 1)] * len(unfinished_at_end)
    return "".join(spelled) + unfinished_at_end, owners


def times(
    attention: npt.NDArray[np.float32],
    word_tokens: Sequence[Sequence[int]],
    waveform: Waveform,
    *,
    first: int = 0,
    last: int | None = None,
) -> list[tuple[float, float]]:
    """Begin and end of each word in seconds from the start of the waveform: in order, and at least 20 ms if they fit.

    Words that share a token share its time evenly: nothing tells where in it the one ends.

    Args:
        attention: [rows, audio tokens], not negative: row n tells what the decoder listened to before it said token n.
        word_tokens: the places of each word's tokens; a word without any may be anywhere.
        waveform: what was heard.
        first: sample where the first word begins at the earliest.
        last: sample where the last one ends at the latest; None is the end of the waveform.
    """
    last = len(waveform) if last is None else last
    num_steps = max((last - first) // STEP_SAMPLES, 1)
    if len(word_tokens) > num_steps:  # more words than can be told apart
        edges = np.linspace(first, last, len(word_tokens) + 1) / SAMPLE_RATE
        return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    if not word_tokens:
        return []
    units = _units(word_tokens)
    middles = first + (np.arange(num_steps) + 0.5) * STEP_SAMPLES
    heard = np.stack([_row(attention, tokens) for tokens, _ in units])
    token_samples = max(audio.num_encoder_frames(len(waveform)) // attention.shape[1], 1) * STEP_SAMPLES
    positions = np.minimum(middles // token_samples, attention.shape[1] - 1).astype(np.int64)
    loud = _loudness(waveform, first, num_steps)
    scores = np.log1p(heard[:, positions] / LISTENED) + LOUD_WORD * loud
    around = np.concatenate([[-1.0], loud, [-1.0]])
    edge_scores = -QUIET_EDGE * np.minimum(around[:-1], around[1:])
    found: list[tuple[float, float]] = []
    places = _places(scores, edge_scores, [count for _, count in units])
    for (begin, end), (_, count) in zip(places, units, strict=True):
        samples = (first + begin * STEP_SAMPLES, last if end == num_steps else first + end * STEP_SAMPLES)
        edges = np.linspace(*samples, count + 1) / SAMPLE_RATE
        found += zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return found


def _units(word_tokens: Sequence[Sequence[int]]) -> list[tuple[set[int], int]]:
    """Neighbours that share tokens, together: their tokens, and how many words they are."""
    units: list[tuple[set[int], int]] = []
    for tokens in word_tokens:
        if units and not units[-1][0].isdisjoint(tokens):
            together, count = units[-1]
            units[-1] = (together.union(tokens), count + 1)
        else:
            units.append((set(tokens), 1))
    return units


def _row(attention: npt.NDArray[np.float32], tokens: set[int]) -> Floats:
    """What was listened to for some tokens, [audio tokens], which sums to 1 unless it is all 0."""
    rows = attention[sorted(tokens)] if tokens else np.ones_like(attention[:1])
    row: Floats = rows.mean(axis=0, dtype=np.float64)
    return row / max(float(row.sum()), 1e-9)


def _loudness(waveform: Waveform, first: int, num_steps: int) -> Floats:
    """How loud each of the steps from sample `first` on is, from -1 to 1; 0 is where speech may begin."""
    whole = waveform[first % STEP_SAMPLES :]
    filled = np.pad(whole, (0, -len(whole) % STEP_SAMPLES)).reshape(-1, STEP_SAMPLES)
    if not len(filled):
        return np.full(num_steps, -1.0)
    levels_db = np.log(np.square(filled, dtype=np.float64).mean(axis=1) + 1e-8) / _DECIBEL
    speech_db = max(levels_db.max() - RANGE_DB, np.percentile(levels_db, 10) + ABOVE_DB)
    step = first // STEP_SAMPLES
    loud: Floats = np.clip((levels_db[step : step + num_steps] - speech_db) / FULL_DB, -1, 1)
    return np.pad(loud, (0, num_steps - len(loud)), constant_values=-1)


def _places(scores: Floats, edge_scores: Floats, least: Sequence[int]) -> list[tuple[int, int]]:
    """Where units [n] in order begin and end, so that the sum of scores [n, steps] and of their edges is the highest.

    A step between two units counts 0. A unit has at least so many steps, and all of them fit.
    """
    sums = np.concatenate([np.zeros((len(scores), 1)), np.cumsum(scores, axis=1)], axis=1)
    before = np.zeros(len(edge_scores))  # the best up to each edge with all units so far
    begins, ends = [], []
    for summed, count in zip(sums, least, strict=True):
        begins.append(before - summed + edge_scores)
        ending = np.full_like(before, -np.inf)
        ending[count:] = np.maximum.accumulate(begins[-1])[:-count] + (summed + edge_scores)[count:]
        ends.append(ending)
        before = np.maximum.accumulate(ending)
    places = []
    limit = len(edge_scores)
    for starting, ending, count in zip(reversed(begins), reversed(ends), reversed(least), strict=True):
        end = int(ending[:limit].argmax())
        begin = int(starting[: end - count + 1].argmax())
        places.append((begin, end))
        limit = begin + 1
    return places[::-1]
