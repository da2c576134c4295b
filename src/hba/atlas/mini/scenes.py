"""The sources of the mini-atlas: for each dataset which modality carries its label, and which only accompany it.

A source makes clips in the studio and yields rows. What carries the label is written in `CARRIED_BY`; everything
else (words of an emotion row, voice of a sentiment row, question, length, person) is drawn without looking at it.
Clips are shared where they are in life (MELD and MOSEI: emotion and sentiment; MMPsy: anxiety and depression), and in
training a humour or sarcasm clip serves two transcripts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from hba.atlas.mini import words
from hba.atlas.mini.plan import Clip, Studio, balanced, row
from hba.taxonomy import BUILTIN

Rows = Iterator[dict[str, Any]]

# Clips in train, validation and test.
SIZES: dict[str, dict[str, tuple[int, int, int]]] = {
    "small": {
        "cremad": (110, 8, 40),
        "tess": (100, 8, 40),
        "meld": (110, 8, 40),
        "mosei": (110, 8, 40),
        "mosei_text": (40, 4, 12),
        "chsimsv2": (100, 8, 40),
        "mmpsy": (190, 24, 80),
        "daicwoz": (150, 16, 80),
        "ptsd": (150, 24, 80),
        "urfunny": (160, 24, 80),
        "mmsd": (180, 24, 80),
        "siq2": (110, 24, 80),
        "intentqa": (120, 24, 80),
        "mimeqa": (120, 24, 80),
    },
}
SIZES["tiny"] = dict.fromkeys(SIZES["small"], (8, 2, 3))

CARRIED_BY: dict[str, str] = {
    "cremad": "voice (pitch, energy, tempo, timbre) and movement of the figure",
    "tess": "voice (pitch, energy, tempo, timbre)",
    "meld_emotion": "voice (pitch, energy, tempo, timbre) and movement of the figure",
    "mosei_emotion": "voice (pitch, energy, tempo, timbre) and movement of the figure",
    "mosei_senti": "words of the transcript (polarity of the adjective, strength of the adverb)",
    "meld_senti": "words of the transcript (polarity of the adjective)",
    "chsimsv2": "words of the Chinese transcript (polarity of the adjective, strength of the adverb)",
    "mmpsy_depression": "voice (slow, flat, quiet)",
    "mmpsy_anxiety": "voice (trembling, breathy, fast)",
    "daicwoz": "voice (slow, flat, quiet) and slumped posture, or restless thumbs only landmarks show",
    "ptsd_in_the_wild": "voice (breaks off, comes back tense) and a startle, or trembling hands only landmarks show",
    "urfunny": "punchline in the transcript and laughter in the audio",
    "mmsd": "words and voice disagreeing; neither alone says anything",
    "siq2": "voice and movement of the figure; the question names the thing",
    "intentqa": "movement of the figure",
    "mimeqa": "movement of the figure",
}

_SENTIMENT_LEVELS = {"highly negative": -3, "negative": -2, "weakly negative": -1, "neutral": 0}
_SENTIMENT_LEVELS |= {"weakly positive": 1, "positive": 2, "highly positive": 3}
_MANNERS = ("neutral", "happy", "steady", "sad", "disgust", "surprise")
_PRESENTERS = ("neutral", "steady", "warm", "surprise")
_FEELINGS = {"happy": "happy", "sad": "sad", "anger": "angry", "fear": "afraid"}
_GOALS = {
    "wave": "to greet a friend",
    "point": "to show the way",
    "clap": "to cheer for the team",
    "reach": "to get something from the shelf",
    "bend": "to pick something up from the floor",
    "ears": "to shut out the noise",
}
_MIMES = {
    "climb": "climbing a ladder",
    "lift": "lifting a heavy weight",
    "row": "rowing a boat",
    "throw": "throwing a ball",
    "drink": "drinking from a cup",
    "drum": "playing the drums",
}


def _acted_emotions(studio: Studio, count: int) -> Rows:
    rng = studio.rng
    for emotion in balanced(BUILTIN.dataset("cremad").labels, count, rng):
        clip = studio.clip(emotion, emotion)
        yield row("cremad", "emotion", emotion, rng=rng, transcript=words.small_talk(rng), video=clip, audio=clip)


def _spoken_emotions(studio: Studio, count: int) -> Rows:
    rng = studio.rng
    for emotion in balanced(BUILTIN.dataset("tess").labels, count, rng):
        clip = studio.clip(emotion, None)
        yield row("tess", "emotion", emotion, rng=rng, transcript=words.small_talk(rng), audio=clip)


def _opinions(emotion_set: str, sentiment_set: str) -> Callable[[Studio, int], Rows]:
    def scene(studio: Studio, count: int) -> Rows:
        rng = studio.rng
        emotions = balanced(BUILTIN.dataset(emotion_set).labels, count, rng)
        sentiments = balanced(BUILTIN.dataset(sentiment_set).labels, count, rng)
        for emotion, sentiment in zip(emotions, sentiments, strict=True):
            clip = studio.clip(emotion, emotion)
            said = words.opinion(_SENTIMENT_LEVELS[sentiment], rng)
            yield row(emotion_set, "emotion", emotion, rng=rng, transcript=said, video=clip, audio=clip)
            yield row(sentiment_set, "sentiment", sentiment, rng=rng, transcript=said, video=clip, audio=clip)

    return scene


def _written_opinions(studio: Studio, count: int) -> Rows:
    rng = studio.rng
    for sentiment in balanced(BUILTIN.dataset("mosei_senti").labels, count, rng):
        level = _SENTIMENT_LEVELS[sentiment]
        # Two splits with one written sentence would be a leak: there is no medium to tell the rows apart.
        yield studio.fresh(partial(_written_opinion, sentiment, level, rng))


def _chinese_opinions(studio: Studio, count: int) -> Rows:
    rng = studio.rng
    levels = dict(zip(BUILTIN.dataset("chsimsv2").labels, (-2, -1, 0, 1, 2), strict=True))
    for sentiment in balanced(list(levels), count, rng):
        manner = words.pick(_MANNERS, rng)
        clip = studio.clip(manner, "talk", described=False) if rng.random() < 0.25 else None
        make = partial(_chinese_opinion, sentiment, levels[sentiment], rng, clip)
        yield make() if clip else studio.fresh(make)


def _written_opinion(sentiment: str, level: int, rng: np.random.Generator) -> dict[str, Any]:
    return row("mosei_senti", "sentiment", sentiment, rng=rng, transcript=words.opinion(level, rng))


def _chinese_opinion(sentiment: str, level: int, rng: np.random.Generator, clip: Clip | None) -> dict[str, Any]:
    said = words.opinion_zh(level, rng)
    return row("chsimsv2", "sentiment zh", sentiment, rng=rng, transcript=said, video=clip, audio=clip)


def _phone_calls(studio: Studio, count: int) -> Rows:
    rng = studio.rng
    voices = {(0, 0): "steady", (1, 0): "depressed", (0, 1): "anxious", (1, 1): "depressed anxious"}
    for depressed, anxious in balanced(list(voices), count, rng):
        clip, said = studio.clip(voices[depressed, anxious], None), words.small_talk(rng)
        low, high = ("no depression", "depression")[depressed], ("no anxiety", "anxiety")[anxious]
        yield row("mmpsy_depression", "depression", low, rng=rng, transcript=said, audio=clip)
        yield row("mmpsy_anxiety", "anxiety", high, rng=rng, transcript=said, audio=clip)


def _interviews(dataset: str, question: str, shown: tuple[str, str], subdued: str) -> Callable[[Studio, int], Rows]:
    """Half of those affected show it in voice and movement, half in their fingers, which landmarks alone show."""

    def scene(studio: Studio, count: int) -> Rows:
        rng = studio.rng
        absent, present = BUILTIN.dataset(dataset).labels
        manners = [(absent, "steady", "sit")] * 2 + [(present, *shown), (present, "steady", subdued)]
        for label, voice, motion in balanced(manners, count, rng):
            clip = studio.clip(voice, motion)
            yield row(dataset, question, label, rng=rng, transcript=words.small_talk(rng), video=clip, audio=clip)

    return scene


def _stories(studio: Studio, count: int) -> Rows:
    rng = studio.rng
    for funny in balanced((False, True), count, rng):
        seen = rng.random() < 0.5
        clip = studio.clip(words.pick(_PRESENTERS, rng), "talk" if seen else None, laughter=funny)
        label = BUILTIN.dataset("urfunny").labels[funny]
        for _ in range(2 if studio.split == "train" else 1):
            said = words.story(funny, rng)
            yield row("urfunny", "humour", label, rng=rng, transcript=said, video=clip if seen else None, audio=clip)


def _remarks(studio: Studio, count: int) -> Rows:
    rng = studio.rng
    for bright, first in balanced([(b, f) for b in (False, True) for f in (False, True)], count, rng):
        seen = rng.random() < 0.33
        clip = studio.clip("warm" if bright else "drawl", "talk" if seen else None)
        for good in (first, not first) if studio.split == "train" else (first,):
            level = int(rng.integers(2, 4)) * (1 if good else -1)
            label = BUILTIN.dataset("mmsd").labels[good != bright]
            said = words.opinion(level, rng)
            yield row("mmsd", "sarcasm", label, rng=rng, transcript=said, video=clip if seen else None, audio=clip)


def _feelings(studio: Studio, count: int) -> Rows:
    rng = studio.rng
    for emotion in balanced(list(_FEELINGS), count, rng):
        clip, noun = studio.clip(emotion, emotion), words.pick(words.NOUNS, rng)
        answer = f"the person is {_FEELINGS[emotion]} about the {noun}"
        yield row("siq2", "social", answer, rng=rng, noun=noun, video=clip, audio=clip)


def _silent_actions(dataset: str, question: str, answers: dict[str, str]) -> Callable[[Studio, int], Rows]:
    def scene(studio: Studio, count: int) -> Rows:
        rng = studio.rng
        rooms: dict[tuple[int, int], Clip] = {}
        for motion in balanced(list(answers), count, rng):
            clip = studio.clip(None, motion, described=False)
            place = (
                clip.length,
                int(rng.integers(3)),
            )  # three rooms of each length, so that picture and sound last alike
            if place not in rooms:
                rooms[place] = studio.clip("ambience", None, described=False, length=clip.length)
            yield row(dataset, question, answers[motion], rng=rng, video=clip, audio=rooms[place])

    return scene


SOURCES: dict[str, Callable[[Studio, int], Rows]] = {
    "cremad": _acted_emotions,
    "tess": _spoken_emotions,
    "meld": _opinions("meld_emotion", "meld_senti"),
    "mosei": _opinions("mosei_emotion", "mosei_senti"),
    "mosei_text": _written_opinions,
    "chsimsv2": _chinese_opinions,
    "mmpsy": _phone_calls,
    "daicwoz": _interviews("daicwoz", "depression", ("depressed", "slump"), "fumble"),
    "ptsd": _interviews("ptsd_in_the_wild", "ptsd", ("startled", "startle"), "tremble"),
    "urfunny": _stories,
    "mmsd": _remarks,
    "siq2": _feelings,
    "intentqa": _silent_actions("intentqa", "intent", _GOALS),
    "mimeqa": _silent_actions("mimeqa", "nonverbal", {m: f"the person is {what}" for m, what in _MIMES.items()}),
}
