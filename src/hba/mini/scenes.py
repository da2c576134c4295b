"""The sources of the mini-atlas: for each dataset which modality carries its label, and which only accompany it.

A source makes clips in the studio and yields rows. What carries the label is written in `CARRIED_BY`; everything
else (words of an emotion row, voice of a sentiment row, question, length, person) is drawn without looking at it.
Clips are shared where they are in life (MELD and MOSEI: emotion and sentiment; MMPsy: anxiety and depression), and in
training a humour or sarcasm clip serves two transcripts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from hba.errors import HbaError
from hba.taxonomy import BUILTIN

# What the people of the mini-atlas say, and how a row asks about it, in a few hundred words.
#
# Every function draws its free choices from the generator it is given; the question, the place of the tags and the
# order of the labels never depend on the answer. A transcript carries sentiment or a punchline only where it is told
# to; `small_talk` carries nothing.


NOUNS = ("movie", "book", "dinner", "trip", "game", "song", "meeting", "phone", "car", "show", "party", "hotel")
_GOOD = ("great", "wonderful", "lovely", "excellent", "amazing")
_BAD = ("terrible", "awful", "horrible", "boring", "disappointing")
_PLAIN = ("usual", "ordinary", "local", "standard", "typical")
_GRADES = {3: ("extremely", "absolutely"), 1: ("slightly", "a bit"), 2: ("",), 0: ("", "quite")}
_OPINIONS = (
    "i think the {noun} was {word} today",
    "well the {noun} is {word} for us",
    "that {noun} seemed {word} to me",
    "we saw that the {noun} was {word}",
)
_SMALL_TALK = (
    "it is eleven in the morning",
    "the {noun} is on the table",
    "i am on my way to the meeting",
    "we will talk about the {noun} later",
    "the door of the car is open",
    "maybe tomorrow it will be cold",
    "they said it is near the station",
    "the {noun} begins at nine",
)
_ANIMALS = ("dog", "cat", "horse", "fish", "cow")
_PEOPLE = ("waiter", "teacher", "driver", "doctor", "friend")
_SETUPS = (
    "after the {noun} i had no money",
    "we were late for the {noun}",
    "nobody liked the {noun}",
    "i lost my {noun} again",
)
_TWISTS = ("paid the bill", "drove us home", "gave a talk", "made the coffee", "called the police")

_ZH_NOUNS = ("电影", "晚饭", "旅行", "会议", "手机", "酒店")
_ZH_GOOD = ("精彩", "满意", "开心")
_ZH_BAD = ("糟糕", "失望", "难受")
_ZH_PLAIN = ("普通", "一般", "平常")
_ZH_GRADES = {2: ("非常", "极其"), 1: ("有点", "稍微"), 0: ("比较", "很")}
_ZH_OPINIONS = ("我觉得这次{noun}{word}", "今天的{noun}{word}", "说到{noun}，真是{word}", "大家都说{noun}{word}")

_QUESTIONS: dict[str, tuple[str, ...]] = {
    "emotion": ("What emotion does the speaker show?", "Which emotion is expressed?", "How does this person feel?"),
    "sentiment": (
        "What is the sentiment of the speaker?",
        "How positive or negative is this?",
        "Which sentiment is expressed?",
    ),
    "sentiment zh": ("说话人的情感倾向是什么？", "这段话表达了怎样的情感？"),
    "humour": ("Is this humour?", "Does the audience find this funny?", "Is the speaker making a joke?"),
    "sarcasm": (
        "Is this sarcasm?",
        "Is the speaker sarcastic?",
        "Does the speaker mean the words, or is this sarcasm?",
    ),
    "anxiety": ("Does the speaker show signs of anxiety?", "Is anxiety present?"),
    "depression": ("Does the speaker show signs of depression?", "Is depression present?"),
    "ptsd": ("Does the speaker show signs of PTSD?", "Is PTSD present?"),
    "social": ("How does the person feel about the {noun}?", "What does this person feel about the {noun}?"),
    "intent": (
        "Why does the person move like this?",
        "What is the goal of the person?",
        "What does the person want to do?",
    ),
    "nonverbal": ("What does the person mime?", "Which action is the person acting out?", "What is the person doing?"),
}


def pick(options: Sequence[str], rng: np.random.Generator) -> str:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def opinion(level: int, rng: np.random.Generator) -> str:
    """A sentence of sentiment `level` -3 (highly negative) .. 3 (highly positive); |level| sets the adverb."""
    words = _GOOD if level > 0 else _BAD if level < 0 else _PLAIN
    word = f"{pick(_GRADES[abs(level)], rng)} {pick(words, rng)}".strip()
    return pick(_OPINIONS, rng).format(noun=pick(NOUNS, rng), word=word)


def opinion_zh(level: int, rng: np.random.Generator) -> str:
    """The Chinese counterpart, `level` -2 (highly negative) .. 2 (highly positive)."""
    words = _ZH_GOOD if level > 0 else _ZH_BAD if level < 0 else _ZH_PLAIN
    word = pick(_ZH_GRADES[abs(level)], rng) + pick(words, rng)
    return pick(_ZH_OPINIONS, rng).format(noun=pick(_ZH_NOUNS, rng), word=word)


def small_talk(rng: np.random.Generator) -> str:
    """A sentence that says nothing about anybody."""
    return pick(_SMALL_TALK, rng).format(noun=pick(NOUNS, rng))


def story(punchline: bool, rng: np.random.Generator) -> str:
    """A set-up and an end: with a punchline an animal does what people do, without one somebody does."""
    actor = pick(_ANIMALS if punchline else _PEOPLE, rng)
    return f"{pick(_SETUPS, rng).format(noun=pick(NOUNS, rng))} so the {actor} {pick(_TWISTS, rng)}"


def problem(
    question: str, transcript: str, labels: Sequence[str], tags: Sequence[str], rng: np.random.Generator, noun: str = ""
) -> str:
    """The prompt of a row. `question` is a key of the table of questions; without `labels` the answer is free.

    `tags` such as '<video>' and '<audio>' stand in front, at the end, only the first of them, or not at all.
    """
    chinese = question.endswith("zh")
    asked = pick(_QUESTIONS[question], rng).format(noun=noun)
    said = f"说话人说：“{transcript}”。" if chinese else f'The speaker says: "{transcript}." '
    choose = ("从以下选项中选择：{}。" if chinese else " Choose from: {}.").format(", ".join(labels)) if labels else ""
    text = (said if transcript else "") + asked + choose
    place = int(rng.integers(4))
    before, after = [("".join(tags), ""), ("", "".join(tags)), ("".join(tags[:1]), ""), ("", "")][place]
    return f"{before}{text}{after}"


# What the mini-atlas holds before anything is drawn: its clips (media to make) and its rows (published schema).
#
# `make_plan` walks over the sources of `scenes`, each with random numbers of its own (seed, source, split), so that no
# source changes another. Names are hashes of (seed, source, split, number); lengths are drawn before and without the
# label; the rows of a split are shuffled together; a clip belongs to one split only.


T = TypeVar("T")
Say = Callable[[int, np.random.Generator], str]
SPLITS = ("train", "validation", "test")
LENGTHS = ((18, 8), (20, 9), (23, 10))  # (blocks of 505 samples, frames): 1.14 s, 1.26 s, 1.45 s
MOST_DRAWS = 1000  # of one prompt without media, until it is new
_ANSWERS = {"sarcasm": "true", "not sarcasm": "false", "humour": "true", "not humour": "false"}
_ANSWERS |= {"ptsd": "PTSD", "no ptsd": "no PTSD"}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One recorded person: what to synthesise. `stem` is the folder and the file name without its ending.

    `voice` is a key of VOICES, 'ambience' or None (no sound); `motion` a key of MOTIONS or None (no camera).
    """

    stem: tuple[str, str]
    key: tuple[int, ...]
    length: int
    voice: str | None
    motion: str | None
    laughter: bool | None = None
    described: bool = True

    def path(self, kind: str) -> str:
        """The file of `kind` audios, videos, opensmile or pose, relative to the atlas."""
        folder, name = self.stem
        audio, video = f"{folder}/audios/{name}.wav", f"{folder}/videos/{name}.mp4"
        paths = {"audios": audio, "videos": video, "opensmile": f"opensmile/{audio}.pt", "pose": f"pose/{video}.pt"}
        return paths[kind]


@dataclass(frozen=True)
class Plan:
    """All clips, and the rows of each split in their final order."""

    clips: list[Clip]
    rows: dict[str, list[dict[str, Any]]]


class Studio:
    """Makes the clips and rows of one source and split: names, lengths and random numbers are its own."""

    def __init__(
        self, seed: int, source: str, split: str, count: int, rng: np.random.Generator, written: set[str]
    ) -> None:
        """`count` scenes are wanted. `written` holds the prompts without media of all splits; it grows."""
        self.seed, self.source, self.split, self.count, self.rng = seed, source, split, count, rng
        self.clips: list[Clip] = []
        self._written = written

    def balanced(self, options: Sequence[T]) -> list[T]:
        """`count` options in random order, each as often as the others (the remainder drawn without repetition)."""
        drawn = [option for option in options for _ in range(self.count // len(options))]
        drawn += [options[i] for i in self.rng.permutation(len(options))[: self.count % len(options)]]
        return [drawn[i] for i in self.rng.permutation(len(drawn))]

    def clip(self, voice: str | None, motion: str | None, *, length: int | None = None, **about: bool) -> Clip:
        """A new clip of a length drawn now, or of that `length` (an index into LENGTHS)."""
        number = len(self.clips)
        name = hashlib.sha256(f"{self.seed}/{self.source}/{self.split}/{number}".encode()).hexdigest()
        drawn = int(self.rng.integers(len(LENGTHS))) if length is None else length
        stem, key = (self.source, name[:16]), (self.seed, int(name[16:24], 16), int(name[24:32], 16))
        self.clips.append(Clip(stem=stem, key=key, length=drawn, voice=voice, motion=motion, **about))
        return self.clips[-1]

    def row(
        self, dataset: str, question: str, answer: str, *clips: Clip, said: str = "", noun: str = ""
    ) -> dict[str, Any]:
        """A row of the published schema about what is seen and heard in the clips, with what is `said` in words.

        `answer` is a canonical label, or free text for a dataset of the kind 'qa'.
        """
        about = BUILTIN.dataset(dataset)
        videos, audios = [c for c in clips if c.motion is not None], [c for c in clips if c.voice is not None]
        kinds = [kind for kind, found in (("video", videos), ("audio", audios)) if found]
        made: dict[str, Any] = {
            "problem": problem(question, said, about.labels, [f"<{kind}>" for kind in kinds], self.rng, noun),
            "answer": _ANSWERS.get(answer, answer) if about.domain else answer,
            "images": [],
            "videos": [clip.path("videos") for clip in videos],
            "audios": [clip.path("audios") for clip in audios],
            "texts": [],
            "dataset": dataset,
            "task": f"{question.split()[0]}_{'cls' if about.domain else 'qa'}",
            "modality_signature": "_".join(["text", *kinds]),
            "ext_video_feats": [clip.path("pose") for clip in videos if clip.described],
            "ext_audio_feats": [clip.path("opensmile") for clip in audios if clip.described],
        }
        return made | ({"class_label": answer} if about.domain else {})

    def written(self, dataset: str, question: str, answer: str, say: Say, level: int) -> dict[str, Any]:
        """A row without media, drawn again while its prompt stands in the atlas already: two splits with one written
        sentence would be a leak, since no medium tells the rows apart."""
        for _ in range(MOST_DRAWS):
            made = self.row(dataset, question, answer, said=say(level, self.rng))
            if made["problem"] not in self._written:
                self._written.add(made["problem"])
                return made
        raise HbaError(f"no new prompt in {MOST_DRAWS} draws", where=self.source, fix="Make fewer rows.")


def make_plan(size: str, seed: int) -> Plan:
    """The clips and rows of the mini-atlas of that size (a key of SIZES) and seed; equal arguments, equal plan."""
    clips: list[Clip] = []
    rows: dict[str, list[dict[str, Any]]] = {}
    written: set[str] = set()
    for s, split in enumerate(SPLITS):
        gathered: list[dict[str, Any]] = []
        for source, counts in sorted(SIZES[size].items()):
            number = int(hashlib.sha256(source.encode()).hexdigest()[:8], 16)
            studio = Studio(seed, source, split, counts[s], np.random.default_rng([seed, number, s]), written)
            gathered.extend(SOURCES[source](studio))
            clips.extend(studio.clips)
        order = np.random.default_rng([seed, 7, s]).permutation(len(gathered))
        rows[split] = [gathered[i] for i in order]
    return Plan(clips, rows)


# --- the scenes of each dataset ---------------------------------------------------------------------------------------


Rows = Iterator[dict[str, Any]]
Scene = Callable[[Studio], Rows]

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


def _labels(dataset: str) -> tuple[str, ...]:
    return BUILTIN.dataset(dataset).labels


def _acted_emotions(studio: Studio) -> Rows:
    for emotion in studio.balanced(_labels("cremad")):
        clip = studio.clip(emotion, emotion)
        yield studio.row("cremad", "emotion", emotion, clip, said=small_talk(studio.rng))


def _spoken_emotions(studio: Studio) -> Rows:
    for emotion in studio.balanced(_labels("tess")):
        clip = studio.clip(emotion, None)
        yield studio.row("tess", "emotion", emotion, clip, said=small_talk(studio.rng))


def _opinions(emotion_set: str, sentiment_set: str) -> Scene:
    def scene(studio: Studio) -> Rows:
        emotions, sentiments = studio.balanced(_labels(emotion_set)), studio.balanced(_labels(sentiment_set))
        for emotion, sentiment in zip(emotions, sentiments, strict=True):
            clip = studio.clip(emotion, emotion)
            said = opinion(_SENTIMENT_LEVELS[sentiment], studio.rng)
            yield studio.row(emotion_set, "emotion", emotion, clip, said=said)
            yield studio.row(sentiment_set, "sentiment", sentiment, clip, said=said)

    return scene


def _written_opinions(studio: Studio) -> Rows:
    for sentiment in studio.balanced(_labels("mosei_senti")):
        yield studio.written("mosei_senti", "sentiment", sentiment, opinion, _SENTIMENT_LEVELS[sentiment])


def _chinese_opinions(studio: Studio) -> Rows:
    levels = dict(zip(_labels("chsimsv2"), (-2, -1, 0, 1, 2), strict=True))
    for sentiment in studio.balanced(list(levels)):
        about, level = ("chsimsv2", "sentiment zh", sentiment), levels[sentiment]
        manner = pick(_MANNERS, studio.rng)
        if studio.rng.random() < 0.25:
            clip = studio.clip(manner, "talk", described=False)
            yield studio.row(*about, clip, said=opinion_zh(level, studio.rng))
        else:
            yield studio.written(*about, opinion_zh, level)


def _phone_calls(studio: Studio) -> Rows:
    voices = {(0, 0): "steady", (1, 0): "depressed", (0, 1): "anxious", (1, 1): "depressed anxious"}
    for depressed, anxious in studio.balanced(list(voices)):
        clip, said = studio.clip(voices[depressed, anxious], None), small_talk(studio.rng)
        low, high = ("no depression", "depression")[depressed], ("no anxiety", "anxiety")[anxious]
        yield studio.row("mmpsy_depression", "depression", low, clip, said=said)
        yield studio.row("mmpsy_anxiety", "anxiety", high, clip, said=said)


def _interviews(dataset: str, question: str, shown: tuple[str, str], subdued: str) -> Scene:
    """Half of those affected show it in voice and movement, half in their fingers, which landmarks alone show."""

    def scene(studio: Studio) -> Rows:
        absent, present = _labels(dataset)
        manners = [(absent, "steady", "sit")] * 2 + [(present, *shown), (present, "steady", subdued)]
        for label, voice, motion in studio.balanced(manners):
            clip = studio.clip(voice, motion)
            yield studio.row(dataset, question, label, clip, said=small_talk(studio.rng))

    return scene


def _stories(studio: Studio) -> Rows:
    for funny in studio.balanced((False, True)):
        seen = studio.rng.random() < 0.5
        clip = studio.clip(pick(_PRESENTERS, studio.rng), "talk" if seen else None, laughter=funny)
        for _ in range(2 if studio.split == "train" else 1):
            yield studio.row("urfunny", "humour", _labels("urfunny")[funny], clip, said=story(funny, studio.rng))


def _remarks(studio: Studio) -> Rows:
    for bright, first in studio.balanced([(b, f) for b in (False, True) for f in (False, True)]):
        seen = studio.rng.random() < 0.33
        clip = studio.clip("warm" if bright else "drawl", "talk" if seen else None)
        for good in (first, not first) if studio.split == "train" else (first,):
            said = opinion(int(studio.rng.integers(2, 4)) * (1 if good else -1), studio.rng)
            yield studio.row("mmsd", "sarcasm", _labels("mmsd")[good != bright], clip, said=said)


def _feelings(studio: Studio) -> Rows:
    for emotion in studio.balanced(list(_FEELINGS)):
        clip, noun = studio.clip(emotion, emotion), pick(NOUNS, studio.rng)
        answer = f"the person is {_FEELINGS[emotion]} about the {noun}"
        yield studio.row("siq2", "social", answer, clip, noun=noun)


def _silent_actions(dataset: str, question: str, answers: dict[str, str]) -> Scene:
    def scene(studio: Studio) -> Rows:
        rooms: dict[tuple[int, int], Clip] = {}
        for motion in studio.balanced(list(answers)):
            clip = studio.clip(None, motion, described=False)
            # Three rooms of each length, so that picture and sound last alike.
            place = (clip.length, int(studio.rng.integers(3)))
            if place not in rooms:
                rooms[place] = studio.clip("ambience", None, described=False, length=clip.length)
            yield studio.row(dataset, question, answers[motion], clip, rooms[place])

    return scene


SOURCES: dict[str, Scene] = {
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
