"""Run exported tasks in the installed Inspect and print its metrics as JSON. In Inspect's own environment:

python run_inspect.py EXPORT TINY_BACKBONE|scripted TASK...   (the folder of EXPORT is the working directory)
"""

from __future__ import annotations

import base64
import io
import json
import sys

from inspect_ai import eval as evaluate
from inspect_ai.model import ModelAPI, ModelOutput, get_model, modelapi

from tiny_chat import TinyChat, scripted

TINY: list[TinyChat | None] = []
TARGETS: dict[str, str] = {}


@modelapi(name="tiny")
class Tiny(ModelAPI):
    async def count_tokens(self, *args, **kwargs):
        return 1

    async def count_text_tokens(self, *args, **kwargs):
        return 1

    async def generate(self, input, tools, tool_choice, config):
        parts = input[-1].content
        text = "".join(part.text for part in parts if part.type == "text")
        # Inspect hands media over as data URLs.
        sounds = [io.BytesIO(base64.b64decode(part.audio.split(",")[1])) for part in parts if part.type == "audio"]
        said = TINY[0].answer(text, sounds) if TINY[0] else scripted(input[-1].id, TARGETS[input[-1].id])
        return ModelOutput.from_content(model="tiny", content=said)


def main() -> None:
    folder, model, *tasks = sys.argv[1:]
    TINY.append(None if model == "scripted" else TinyChat(model))
    sys.path.insert(0, folder)
    import hba_tasks

    found = {}
    for name in tasks:
        task = getattr(hba_tasks, name)()
        for sample in task.dataset:
            TARGETS[str(sample.id)] = str(sample.target)
        (log,) = evaluate(task, model=get_model("tiny/tiny"), display="none", log_dir="logs", log_format="json")
        assert log.status == "success", log.error
        found[name] = {metric: each.value for score in log.results.scores for metric, each in score.metrics.items()}
    sys.stdout.write("RESULT " + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
