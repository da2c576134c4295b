"""Run exported tasks in the installed lmms-eval and print its metrics as JSON. In lmms-eval's own environment:

python run_lmms_eval.py EXPORT TINY_BACKBONE|scripted TASK...
"""

from __future__ import annotations

import json
import sys

from lmms_eval import evaluator, models
from lmms_eval.api.model import lmms
from lmms_eval.tasks import TaskManager

from tiny_chat import TinyChat, scripted


class Answers(lmms):
    is_simple = True

    def __init__(self, tiny: TinyChat | None) -> None:
        super().__init__()
        self.tiny = tiny

    def generate_until(self, requests):
        found = []
        for request in requests:
            text, _, doc_to_visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            visuals = doc_to_visual(document)
            kinds = [part["type"] for part in document["parts"] if part["type"] != "text"]
            assert len(visuals) == len(kinds), (visuals, kinds)
            sounds = [part["path"] for part in document["parts"] if part["type"] == "audio"]
            said = self.tiny.answer(text, sounds) if self.tiny else scripted(document["id"], document["target"])
            found.append(said)
        return found

    def loglikelihood(self, requests):
        raise NotImplementedError

    def generate_until_multi_round(self, requests):
        raise NotImplementedError


def main() -> None:
    export, model, *tasks = sys.argv[1:]
    answers = Answers(None if model == "scripted" else TinyChat(model))
    manager = TaskManager(include_path=export, model_name="tiny")
    models.get_model = lambda *args, **kwargs: type("Made", (), {"create_from_arg_string": lambda *a, **k: answers})
    results = evaluator.simple_evaluate(
        model="tiny", model_args="", tasks=tasks, task_manager=manager, batch_size=1, bootstrap_iters=0
    )
    found = {
        task: {k.split(",")[0]: v for k, v in of.items() if "stderr" not in k}
        for task, of in results["results"].items()
    }
    sys.stdout.write("RESULT " + json.dumps(found, default=str) + "\n")


if __name__ == "__main__":
    main()
