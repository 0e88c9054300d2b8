"""Train a tiny model, killed with SIGKILL again and again and resumed, and once in peace; prints what came out.

    python killed_run.py FOLDER SEED

A process of its own, because its children are forked before torch has done anything in it, and killed. Half of the
kills come from within, in the middle of a step, the others from outside at any moment, writing included.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_encoder import tiny_bert, tiny_tokenizer

from offramp.models.checkpoint import Checkpoint, load_checkpoint
from offramp.models.data import TextExample, TextSplits, load_tokenizer, text_rows
from offramp.models.encoder import EarlyExitEncoder, EncoderConfig
from offramp.models.plan import Plan, RunOptions, Stage
from offramp.models.rows import TrainingRows
from offramp.models.train import Output, resume_training, train_model

WORDS = ("good", "bad", "film", "plot", "the", "a", "very", "was")
PLAN = Plan(
    (
        Stage("alternating", epochs=2, encoder_lr=3e-3, layer_dropout=0.2),
        Stage("labels_or_answers", epochs=1, head_lr=1e-2),
    ),
    RunOptions(batch_size=8, precision="float32", snapshot_steps=2, snapshot_seconds=0.02),
)
NUM_KILLS = 5


def make_rows(tokenizer_path: Path) -> TrainingRows:
    """48 random texts, half of them about nothing but good or bad."""
    draw = random.Random(1)
    texts = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 9))) for _ in range(64)]
    examples = tuple(TextExample(text, text.count("good") > text.count("bad")) for text in texts)
    splits = TextSplits(examples[:48], examples[48:], (), ("no", "yes"), tuple(texts[48:]))
    return text_rows(load_tokenizer(tokenizer_path, 16), splits)


def go_on(folder: Path, tokenizer_path: Path) -> None:
    """Begin the run in `folder`, or resume it."""
    rows = make_rows(tokenizer_path)
    if (folder / "training.pt").is_file():
        resume_training(folder, rows)
    elif not folder.exists():
        torch.manual_seed(0)
        model = EarlyExitEncoder(tiny_bert(), EncoderConfig(exits=(1, 3)))
        train_model(Checkpoint(model, tokenizer_path, ("no", "yes"), 16), rows, PLAN, Output(folder))


def in_child(work: Callable[[], None], kill_after_s: float | None = None) -> None:
    """Run `work` in a forked child; with `kill_after_s`, kill it then."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0


def killed_at(num_steps: int, work: Callable[[], None]) -> Callable[[], None]:
    """`work` in a process that kills itself in the step after `num_steps`, weights half updated."""
    honest, taken = torch.optim.AdamW.step, []

    def step(optimizer: torch.optim.AdamW) -> None:
        honest(optimizer)
        taken.append(1)
        if len(taken) > num_steps:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        torch.optim.AdamW.step = step  # type: ignore[method-assign,assignment]
        work()

    return killed


def digest(folder: Path) -> str:
    """A hash of the weights; loading them proves the checkpoint whole."""
    load_checkpoint(folder)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    tokenizer_path = folder / "tokenizer.json"
    tiny_tokenizer().save(str(tokenizer_path))
    draw = random.Random(seed)
    killed, peaceful = folder / "killed", folder / "peaceful"
    unfinished = 0
    for number in range(NUM_KILLS):
        work = lambda: go_on(killed, tokenizer_path)  # noqa: E731
        if number % 2 == 0:
            in_child(killed_at(draw.randrange(6), work))
        else:
            in_child(work, kill_after_s=draw.uniform(0.0, 0.3))
        unfinished += (killed / "training.pt").is_file()
    in_child(lambda: go_on(killed, tokenizer_path))
    in_child(lambda: go_on(peaceful, tokenizer_path))
    found = {"unfinished": unfinished, "killed": digest(killed), "peaceful": digest(peaceful)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
