"""EAT as the paper evaluates it (arXiv 2510.12856, section 6): an encoder that prunes, looks at a window and exits.

Reads the folder of a finished sweep with the variants dense, static (half the depth, the role of DistilBERT) and eat:
`offramp sweep eat-rotten-tomatoes -o FOLDER --steps train,export,trace,calibrate`. Per seed, the uncut dense and static
encoders in ONNX Runtime and EAT in the runner under every policy answer the same test rows, interleaved in one
process: one row a request (latency), and 32 (throughput). Policies: tau at every exit, patience (two exits in a row
agree), the certified one of the bundle, the fastest that cost at most so much on validation, and one as fast as the
static encoder. Nothing is chosen on test rows.

Physics: with exits a row pays for the layers that it runs and with pruning for the tokens that it has left there; what
it pays beside that, an exit's head and some 20 us a segment, is why FLOPs fall further than times. At 32 rows a
request, survivors are gathered, so nobody waits for the slowest row.

Writes RESULTS/<sweep>.csv (the paper's columns, means over seeds), .json and .svg, and the paper's published figures,
of another machine, model and data, to RESULTS/eat-published.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from eat_plots import draw
from eat_points import DENSE, EAT, STATIC, Flops, Point, flops_of, points_of, worth_of
from eat_table import COLUMNS, MORE_COLUMNS, against_dense, csv_of, markdown_of, over_seeds, published
from machine import describe_machine
from numpy.typing import NDArray
from timed import progress

from offramp.commands.benchmark import Answer, asking, runner_answer, uncut_answer
from offramp.commands.sweep import SweepRequest, requested_sweep, run_sweep
from offramp.commands.sweep_bench import policy_of, requests_of
from offramp.commands.sweep_run import Place
from offramp.commands.sweep_steps import BUNDLE, TEST_TRACE, exported
from offramp.commands.sweeps import Measure, Sweep, runs_of
from offramp.commands.traces import stored_trace
from offramp.models.checkpoint import load_checkpoint
from offramp.policy import Policy
from offramp.runtime import Runner
from offramp.runtime.timing import interleaved_ms, summary
from offramp.storage import write_file
from offramp.trace import load_trace

RESULTS = Path(__file__).parent / "results"
VARIANTS = (DENSE, STATIC, EAT)
BATCH = 32
WARMUP = 5
MIN_ROUNDS = 2


def main() -> None:
    """Print progress to stderr, the table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of the sweep")
    parser.add_argument("--sweep", default="", help="its name or .toml file; the folder's name without")
    parser.add_argument("--seeds", type=int, default=0, help="only the first so many")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing per seed, one row a request")
    parser.add_argument("--batch-seconds", type=float, default=20.0, help=f"the same for {BATCH} rows a request")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as ONNX Runtime likes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a tiny sweep of its own: shows the script, no result")
    options = parser.parse_args()
    if options.quick:
        with tempfile.TemporaryDirectory(prefix="offramp-bench-") as folder:
            evaluate(tiny_sweep(Path(folder), options))
        return
    if options.folder is None or not options.folder.is_dir():
        raise SystemExit("give the folder of a sweep, made by `offramp sweep eat-rotten-tomatoes -o FOLDER`")
    evaluate(options)


def evaluate(options: argparse.Namespace) -> None:
    """Measure all seeds of the sweep, and write and print the tables."""
    sweep = requested_sweep(SweepRequest(options.sweep or options.folder.name, options.seeds))
    places = places_of(sweep, options.folder)
    machine = describe_machine()
    models = {name: load_checkpoint(places[sweep.seeds[0]][name].checkpoint).model for name in VARIANTS}
    exits = tuple(models[EAT].config.exits)
    flops: dict[str, Flops] = {}
    seeds = []
    for seed in sweep.seeds:
        progress(f"{sweep.name}, seed {seed}")
        seeds.append(rows_of_seed(places[seed], models, flops, sweep.measure, options))
    rows = over_seeds(seeds)
    document = {
        "bench": "eat",
        "sweep": sweep.name,
        "machine": machine,
        "threads": options.threads,
        "seeds": list(sweep.seeds),
        "test_rows": len(test_trace(places[sweep.seeds[0]][EAT]).labels),
        "exits": list(exits),
        "flops": "matrix products of layers and heads counted by PyTorch's FlopCounterMode, a share of dense",
        "rows": rows,
        "targets": targets_of(rows),
        "by_seed": [list(found.values()) for found in seeds],
    }
    name = sweep.name if sweep.name.startswith("eat") else f"eat-{sweep.name}"
    columns = (*COLUMNS, *MORE_COLUMNS, *(f"{column}_sd" for column in (*COLUMNS[2:], *MORE_COLUMNS)))
    write_file(options.results / f"{name}.csv", csv_of(rows, columns).encode())
    write_file(options.results / f"{name}.json", (json.dumps(document, indent=1) + "\n").encode())
    write_file(options.results / "eat-published.csv", csv_of(published(), list(published()[0])).encode())
    tests = [test_trace(places[seed][EAT]) for seed in sweep.seeds]
    draw(rows, tests, exits, sweep.name, options.results / f"{name}.svg")
    print("\n".join(markdown_of(rows)))
    print(json.dumps({key: value for key, value in document.items() if key != "by_seed"}))


def places_of(sweep: Sweep, folder: Path) -> dict[int, dict[str, Place]]:
    """Return seed -> variant -> where it lies; exits where a step of the sweep is missing."""
    places: dict[int, dict[str, Place]] = {seed: {} for seed in sweep.seeds}
    for run in runs_of(sweep):
        if run.variant in VARIANTS:
            places[run.seed][run.variant] = place = Place(folder, run)
            if exported(place)[0] is None or not (place.path / TEST_TRACE).is_file():
                raise SystemExit(
                    f"{place.path} is not exported and recorded; run `offramp sweep {sweep.name} -o {folder} "
                    "--steps train,export,trace,calibrate`"
                )
    return places


def rows_of_seed(
    places: Mapping[str, Place],
    models: Mapping[str, Any],
    flops: dict[str, Flops],
    measure: Measure,
    options: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Return a row per model and policy of one seed, by name; `flops` is filled where a length is new."""
    traces = {name: test_trace(place) for name, place in places.items()}
    for name, trace in traces.items():
        flops.setdefault(name, flops_of(models[name], trace.lengths))
    dense_flops = float(np.mean([flops[DENSE][length][-1] for length in traces[DENSE].lengths.tolist()]))
    costs = {name: costs_of(places[name], options.threads) for name in (STATIC, EAT)}
    validation = replace(stored_trace(places[EAT].path / BUNDLE, "onnxruntime", "fp32"), costs_ms=costs[EAT])
    target = float(costs[EAT].sum() / costs[STATIC].sum())
    points = points_of(validation, policy_of(places[EAT]), measure.calibrate, target)
    by_name = {name: (name, Point(name, "", Policy.full_depth())) for name in (DENSE, STATIC)}
    by_name |= {point.key: (EAT, point) for point in points}
    rows = {
        key: {"model": point.model, "tau": point.tau, "limits": list(point.policy.limits)}
        | worth_of(point, traces[variant], models[variant].config.exits, flops[variant], dense_flops)
        for key, (variant, point) in by_name.items()
    }
    for size, seconds in ((1, options.seconds), (BATCH, options.batch_seconds)):
        chosen = [point for point in points if size == 1 or point.in_batches]
        for key, times_ms in timed(places, chosen, size, seconds, options.threads).items():
            found = summary(times_ms)
            if size == 1:
                rows[key] |= {"latency_ms": found["mean_ms"], "rounds": len(times_ms)}
                rows[key] |= {name: found[name] for name in ("p50_ms", "p95_ms", "p99_ms")}
            else:
                rows[key]["throughput"] = 1e3 * size / found["mean_ms"]
    against_dense(rows, DENSE)
    return rows


def costs_of(place: Place, threads: int) -> NDArray[np.float64]:
    """Return what every segment costs for one row, (E,) ms, now: traces may have been recorded beside other work."""
    with Runner.open(place.path / BUNDLE, "onnxruntime", Policy.full_depth(), threads, "fp32") as runner:
        return runner.record(requests_of(place, runner, BATCH, 2 * BATCH)).costs_ms


def timed(places: Mapping[str, Place], points: list[Point], size: int, seconds: float, threads: int) -> dict[str, Any]:
    """Return the milliseconds of requests of `size` test rows, (R,) per model and policy, interleaved."""
    with ExitStack() as stack:
        opened = {}
        for name, place in places.items():
            runner = Runner.open(place.path / BUNDLE, "onnxruntime", Policy.full_depth(), threads, "fp32")
            opened[name] = stack.enter_context(runner)
        eat = opened[EAT]
        answers: dict[str, Answer] = {
            name: uncut_answer(places[name].path / BUNDLE, opened[name].manifest, threads) for name in (DENSE, STATIC)
        }
        for point in points:  # on the same engines
            answers[point.key] = runner_answer(Runner(eat.engines, eat.manifest, point.policy))
        requests = requests_of(places[EAT], eat, size, 1000)  # drawn at random, as in the paper
        calls: dict[str, Callable[[], None]] = {name: asking(answer, requests) for name, answer in answers.items()}
        round_ms = sum(float(times.mean()) for times in interleaved_ms(calls, 1, WARMUP if size == 1 else 0).values())
        rounds = max(MIN_ROUNDS, int(1e3 * seconds / round_ms))
        progress(f"{size} rows a request: {rounds} rounds of {len(calls)}")
        return interleaved_ms(calls, rounds, 0)


def test_trace(place: Place) -> Any:
    return load_trace(place.path / TEST_TRACE)


def targets_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, of the measured points, the fastest within a point of the dense encoder, and the best as fast as static.

    Points were chosen on validation, but which of them is named here is seen on test.
    """
    static = next(row for row in rows if row["model"] == STATIC)
    near = [row for row in rows if row["model"].startswith(EAT) and row["delta_acc_pp"] >= -1.0]
    as_fast = [row for row in rows if row["model"].startswith(EAT) and row["latency_ms"] <= 1.02 * static["latency_ms"]]
    best = max(near, key=lambda row: row["speedup_p50"], default=None)
    at_its_speed = max(as_fast, key=lambda row: row["accuracy"], default=None)
    picked = ("model", "tau", "accuracy", "delta_acc_pp", "p50_ms", "speedup_p50", "latency_ms", "speedup_vs_dense")
    return {
        "fastest_within_1pp_of_dense": {name: best[name] for name in picked} if best else None,
        "best_at_static_mean_latency": {name: at_its_speed[name] for name in picked} if at_its_speed else None,
        "static": {name: static[name] for name in picked},
    }


def tiny_sweep(folder: Path, options: argparse.Namespace) -> argparse.Namespace:
    """Make a sweep of a tiny encoder in `folder`, do its steps, and return options that measure it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    torch.set_num_threads(1)  # for sizes at which threads only wait for each other
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder / "encoder")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "encoder" / "tokenizer.json"))
    lines = [
        json.dumps({"text": f"{word} film {'very ' * (n % 9)} {n}", "label": word})
        for n in range(100)
        for word in ("good", "bad")
    ]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    data = f'[data]\nname = "{folder}/texts.jsonl"\nmax_length = 24\n'
    model = f'[model]\nkind = "bert"\nexits = [1, 2, 3]\nweights = "{folder}/encoder"\n'
    (folder / "recipe.toml").write_text(f"{data}{model}[model.pruning]\nlayers = [1]\n[[stage]]\nepochs = 1\n")
    alone = 'without = ["model.pruning"]\n'
    (folder / "tiny.toml").write_text(
        'recipe = "recipe.toml"\nseeds = 1\n'
        f'[variant.dense]\n{alone}set = {{ "model.exits" = [3], "stage.strategy" = "final" }}\n'
        f'[variant.static]\n{alone}set = {{ "model.exits" = [1], "stage.strategy" = "final" }}\n'
        "[variant.eat]\n[measure.calibrate]\nmax_risk = 0.5\n"
    )
    request = SweepRequest(str(folder / "tiny.toml"), steps=("train", "export", "trace", "calibrate"))
    run_sweep(folder / "out", request, lambda line: print(line, file=sys.stderr))
    quick = {"folder": folder / "out", "sweep": request.recipe, "seconds": 0.5, "batch_seconds": 0.5}
    return argparse.Namespace(**{**vars(options), **quick, "results": folder / "results"})


if __name__ == "__main__":
    main()
