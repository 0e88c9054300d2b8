"""Many small requests at once through a pool: threads and asyncio tasks share batches, and survivors are regrouped.

    python examples/04_pool.py BUNDLE

A pool takes requests from anywhere; the runner beneath stays the same. Costs are measured here, on texts of the kind
that will come: with them the pool knows how large a batch pays, and where waiting for other survivors does.
"""

import asyncio
import sys
from pathlib import Path

from offramp.errors import DeadlineError, QueueFullError
from offramp.runtime import Admission, Pool, Runner, measure_batch_costs

TEXTS = ["a moving , funny film", "dull", "i laughed , i cried , and then i left", "not bad at all"]


async def serve(pool: Pool, runner: Runner) -> int:
    """Ask about every text from a task of its own, as a web framework would."""

    async def ask(text: str) -> str:
        try:
            result = await pool.submit(runner.encode([text]), deadline_ms=5000)
        except (DeadlineError, QueueFullError) as exc:  # the load's fault: answer 503
            return str(exc)
        return f"{runner.manifest.labels[result.prediction[0]]} at exit {result.exit_index[0]}: {text}"

    answers = await asyncio.gather(*(ask(text) for text in TEXTS * 8))
    print(*answers[: len(TEXTS)], sep="\n")
    return len(answers)


def main(bundle: Path) -> None:
    with Runner.open(bundle, threads=1) as runner:
        costs = measure_batch_costs(runner, runner.encode(TEXTS), sizes=(1, 2, 4, 8), budget_s=0.5)
        with Pool(runner, max_batch=8, costs=costs, admission=Admission(max_rows=256, pad_to=8)) as pool:
            print("answered in tasks:", asyncio.run(serve(pool, runner)))
            answer = pool.submit(runner.encode(["a thread may ask too"]))  # the thread waits when it likes
            print("answered in a thread:", answer.result().reason)
            for tokens, plan in pool.plans.items():
                print(f"{tokens} tokens: batches of {plan.batch_rows}, regrouping gains {plan.gain:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
