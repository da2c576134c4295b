"""An atlas of free-form rows and a run that answered them, without media, for tests and benchmarks of the judge."""

import json

DATASETS = ("siq2", "intentqa", "mimeqa")


def make_run(root, rows):
    """Make `root/atlas` and `root/run` with `rows` answers; the shares of right ones by dataset.

    Six of ten are right and every 50th is empty. References repeat, so that a question looked up by its answer would be
    another sample's.
    """
    (root / "atlas").mkdir(parents=True)
    (root / "run").mkdir()
    atlas, predictions, right = [], [], {key: [] for key in DATASETS}
    for i in range(rows):
        dataset, reference = DATASETS[i % 3], f"person {i % 37} is waving"
        correct, empty = (i * 7919) % 10 < 6, i % 50 == 49
        answer = "" if empty else reference.upper() if correct else f"something else {i}"
        base = {"dataset": dataset, "task": "social_qa"}
        media = {"modality_signature": "text_video", "videos": [f"{i}.mp4"]}
        atlas.append(base | media | {"problem": f"<video>What happens in clip {i}?", "answer": reference})
        said = {"id": f"test/{i + 1}", "split": "test", "target": reference, "output": answer, "answer": answer}
        predictions.append(base | said | {"label": None, "error": None})
        right[dataset].append(correct and not empty)
    for path, lines in ((root / "atlas" / "test.jsonl", atlas), (root / "run" / "predictions.jsonl", predictions)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"model": "m", "data": {"path": str(root / "atlas")}, "split": "test"}
    (root / "run" / "predict.json").write_text(json.dumps(facts))
    return {key: sum(values) / len(values) for key, values in right.items()}
