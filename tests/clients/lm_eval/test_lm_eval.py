"""C24, C25: the evaluation harness scores the demo model through /v1/completions, with the server's
own tokenizer, and finds what the server's log-probabilities say. Run by `make test-clients`, which
installs the harness beside .venv: see requirements.txt.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SITE = Path(os.environ.get("LM_EVAL_SITE", HERE.parents[2] / "build/lm-eval/site"))
ITEMS = [
    ("Once upon a", [" time", " stone", " the"]),
    ("There was once a king who had a", [" daughter", " of", " computer"]),
    ("and they lived happily ever", [" after", " before", " never"]),
    ("The old woman said to the", [" king", " and", " ran"]),
    ("Then the wolf", [" said", " apple", " of"]),
]


def score(http, text, choice):
    """Log-probability of the choice after the text, as the server scores a prompt."""
    start = len(http.post("/tokenize", json={"prompt": text}).json()["tokens"])
    asked = {"prompt": text + choice, "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = http.post("/v1/completions", json=asked).json()
    return sum(answer["choices"][0]["logprobs"]["token_logprobs"][start:])


def test_c24_lmeval_scores_are_the_servers(http, url, tmp_path):
    assert (SITE / "lm_eval").is_dir(), "make test-clients installs the harness"
    expected = [max(choices, key=lambda c, t=text: score(http, t, c)) for text, choices in ITEMS]
    data = tmp_path / "king.jsonl"
    with data.open("w") as file:
        for (text, choices), best in zip(ITEMS, expected, strict=True):
            answer = choices.index(best)
            file.write(json.dumps({"text": text, "choices": choices, "answer": answer}) + "\n")
    task = (HERE / "king.yaml").read_text()
    task += f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
    (tmp_path / "king.yaml").write_text(task)
    args = f"model=demo,base_url={url}/v1/completions,tokenizer_backend=remote,num_concurrent=2"
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "lm_eval",
                "run",
                "--model",
                "local-completions",
                "--model_args",
                args,
            ),
            *("--tasks", "king", "--include_path", str(tmp_path)),
            *("--output_path", str(tmp_path / "out"), "--log_samples"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(SITE),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_king*.jsonl")
    rows = sorted(map(json.loads, samples.open()), key=lambda row: row["doc_id"])
    assert len(rows) == len(ITEMS)
    for row, (text, choices) in zip(rows, ITEMS, strict=True):
        assert row["acc"] == 1.0
        found = [float(pair[0]) for pair in row["filtered_resps"]]
        wanted = [score(http, text, choice) for choice in choices]
        assert found == pytest.approx(wanted, abs=1e-3)
