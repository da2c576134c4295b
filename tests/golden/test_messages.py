"""Messages built from a row's tags, against those of the released dataset class."""

import json
from pathlib import Path

import pytest

from hba.batch.prompt import build_messages
from hba.errors import InputError

GOLDEN = json.loads((Path(__file__).parent / "data/messages/base_dataset.json").read_text())
PAIRS = [(c, e["messages"]) for c, e in zip(GOLDEN["inputs"]["cases"], GOLDEN["expected"]["cases"], strict=True)]
# Cases in which the default does what is right instead, tested one by one below.
QUIRKS = {"tag_without_media", "modality_disabled_missing_tag"}
# Plain strings as content and jinja templates belong to the released file reader, not to the tags.
OTHER = {"no_media_keys_template", "template_text", "template_video_missing", "jinja_in_prompt"}
NAMES = {"images": "image", "videos": "video", "audio": "audio"}


def messages_of(case, published):
    row = case["row"]
    counts = {"image": len(row["images"]), "video": len(row["videos"]), "audio": len(row["audios"])}
    modalities = [NAMES[m] for m in case["modalities"].split(",")]
    return build_messages(row["problem"], counts, where="f:1", modalities=modalities, published=published)


@pytest.mark.parametrize(("case", "expected"), [p for p in PAIRS if p[0]["id"] not in OTHER], ids=lambda c: str(c)[:40])
def test_published_messages_are_reproduced(case, expected):
    assert messages_of(case, published=True) == expected


@pytest.mark.parametrize(
    ("case", "expected"), [p for p in PAIRS if p[0]["id"] not in OTHER | QUIRKS], ids=lambda c: str(c)[:40]
)
def test_default_messages_agree_where_the_release_is_right(case, expected):
    assert messages_of(case, published=False) == expected


def case(name):
    return next(c for c, _ in PAIRS if c["id"] == name)


def test_a_tag_without_its_medium_is_an_error_that_names_the_row():
    with pytest.raises(InputError, match=r"f:1, problem: problem has 1 <video> tags for 0 videos"):
        messages_of(case("tag_without_media"), published=False)


def test_a_modality_that_is_switched_off_leaves_no_tag_behind():
    messages = messages_of(case("modality_disabled_missing_tag"), published=False)
    assert messages == [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Q"}]}]
