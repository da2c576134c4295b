"""What the people of the mini-atlas say, and how a row asks about it, in a few hundred words.

Every function draws its free choices from the generator it is given; the question, the place of the tags and the
order of the labels never depend on the answer. A transcript carries sentiment or a punchline only where it is told
to; `small_talk` carries nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
