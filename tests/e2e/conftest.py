"""A tiny random Llama and small jsonl tasks, and a way to run the pipeline against the real stack."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infra.environment import job_variables
from tests.e2e import here
from tests.e2e.browser import NoBrowser, Pages, chromium, window
from tests.e2e.here import Finished, Pipeline
from workers.text.prompt import DEFAULT_WRAPPER

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["red", "blue", "green", "cat", "dog", "tree", "runs", "sleeps", "jumps", "the", "a", "small", "big", "old"]


def write_tiny_base(folder: Path, seed: int = 0) -> Path:
    """A random two-layer Llama with a byte-level tokenizer, saved as a checkpoint."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=special[1], eos_token=special[2], pad_token=special[0], unk_token=special[0]
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
            initializer_range=0.2,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_task(path: Path, name: str, rows: int = 120) -> Path:
    """A task whose answer is always the same word, so that a few steps visibly lower the loss."""
    rng = random.Random(name)
    answer = rng.choice(WORDS)
    lines = {" ".join(rng.choices(WORDS, k=5)) for _ in range(rows * 2)}
    path.write_text(
        "".join(json.dumps({"input": text, "target": answer}) + "\n" for text in sorted(lines)[:rows]), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Callable[..., dict[str, Any]]:
    """A function that gives a small configuration, whose keys no other suite shares; keywords replace sections."""
    folder = tmp_path_factory.mktemp("tiny-tasks")

    def make(suite: str, held_in: int = 4, **sections: Any) -> dict[str, Any]:
        def task(name: str) -> dict[str, Any]:
            own = f"{suite}-{name}"  # rows, and so keys, of this suite alone
            file = write_task(folder / f"{own}.jsonl", own)
            return {"source": f"jsonl:{file}", "template": "Say it.\n{input}", "metric": "exact_match"}

        return {
            "suite": suite,
            "base": f"path:{tiny_base}",
            "prompt": {"wrapper": DEFAULT_WRAPPER, "max_input_tokens": 64, "max_target_tokens": 16},
            "splits": {"train": 64, "validation": 8, "gate": 8, "test": 8},
            "held_in": {f"in{number}": task(f"in{number}") for number in range(held_in)},
            "held_out": {"out0": task("out0")},
            "mask": {"criterion": "connection_sensitivity", "granularity": "element", "density": 0.2,
                     "reselect_every": 3, "modules": r".*\.(v_proj|o_proj|up_proj)"},
            "train": {"steps": 8, "batch_size": 8, "learning_rate": 0.02, "validate_every": 4,
                      "compute_dtype": "float32"},
            "merge": {"fan_in": 2, "candidates": [{"method": "mean"}, {"method": "ties"},
                                                  {"method": "task_arithmetic", "params": {"lambda": [0.3, 0.6]}}]},
            "evaluate": {"few_shot": 1, "batch_size": 8},
            "resources": {"expert": {"memory_gib": 1.5}, "evaluator": {"memory_gib": 1.5},
                          "node": {"cpus": 0, "memory_gib": 1.0}},
        } | sections  # fmt: skip

    return make


def pipeline_in(
    folder: Path, config: dict[str, Any], *overrides: str,
    own_process: bool = False, submit: bool = False, timeout: float = 420,
) -> Finished:  # fmt: skip
    """A run; its status, output and results. The folder given first holds configuration and report.

    In this process, or by one of its own, started or submitted, on the stack's Ray and within so many seconds.
    """
    file, report = folder / "config.yaml", folder / "report"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    if not (own_process or submit):
        return here.run(file, report, *overrides)
    written = report / "results.json"
    written.unlink(missing_ok=True)
    ray = str(Path(sys.executable).with_name("ray"))
    environment = json.dumps({"env_vars": job_variables()})
    main = ["pipeline/main.py", "--config", str(file), "--report", str(report), *overrides]
    ended = subprocess.run(
        [ray, "job", "submit", "--working-dir", str(ROOT), "--runtime-env-json", environment, "--", "python", *main]
        if submit else [sys.executable, *main],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    return Finished(ended.returncode, ended.stdout, json.loads(written.read_text()) if written.is_file() else None)


@pytest.fixture(scope="module")
def pages() -> Iterator[Pages]:
    """A browser window, fetched on the first use. Without one the tests fail, or are skipped if that was asked for."""
    try:
        found = chromium()
    except NoBrowser as error:
        if os.environ.get("FACTORY_NO_BROWSER"):
            pytest.skip(str(error))
        pytest.fail(f"{error}; FACTORY_NO_BROWSER=1 leaves the tests of pages out")
    with window(found) as opened:
        yield opened


@pytest.fixture
def pipeline(stack: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Pipeline:
    """Run the main job in the test's own folder: `pipeline_in`. The stack's Ray starts with the first run on it."""

    def run(config: dict[str, Any], *overrides: str, **how: Any) -> Finished:
        if how.get("own_process") or how.get("submit"):
            request.getfixturevalue("ray_stack")
        return pipeline_in(tmp_path, config, *overrides, **how)

    return run
