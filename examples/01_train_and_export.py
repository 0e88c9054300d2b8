"""Train a classifier with exits on a few real sentences, export it, and ask it something.

    python examples/01_train_and_export.py OUTPUT_DIRECTORY

A minute's worth of training, so not a good classifier: `offramp train` does the whole thing.
"""

import sys
from pathlib import Path

from offramp import Policy
from offramp.commands.sources import source_from_argument
from offramp.export.export_bundle import ExportOptions, export_bundle
from offramp.models.checkpoint import checkpoint_from_encoder
from offramp.models.data import TextSplits, default_encoder_path, load_rotten_tomatoes, load_tokenizer, text_rows
from offramp.models.encoder import EncoderConfig
from offramp.models.plan import Plan, Stage
from offramp.models.train import Output, train_model
from offramp.runtime import Runner


def main(output: Path) -> None:
    everything = load_rotten_tomatoes()
    few = everything.train[:160], everything.validation[:64], everything.test[:64]
    splits = TextSplits(*few, everything.label_names)

    config = EncoderConfig(exits=(1, 2), num_classes=2)  # two layers of MiniLM, an exit after each
    checkpoint = checkpoint_from_encoder(default_encoder_path(), config, splits.label_names, max_length=64)
    rows = text_rows(load_tokenizer(checkpoint.tokenizer_path, 64), splits)
    report = train_model(checkpoint, rows, Plan((Stage("joint", epochs=1),)), Output(output / "checkpoint"))
    print("validation accuracy per exit:", report.validation)

    source = source_from_argument(str(output / "checkpoint"), (), 20, "rotten-tomatoes", {})
    manifest = export_bundle(source, output / "bundle", ExportOptions(precision="fp32"))
    print("chain equals whole graph bit for bit:", manifest.parity["chain_bit_equal"])

    policy = Policy.thresholds("max_prob", [0.6])  # one value per exit before the final one
    with Runner.open(output / "bundle", policy=policy) as runner:
        result = runner.run(runner.encode(["a moving and very funny film", "dull from start to finish"]))
    for row, prediction in enumerate(result.prediction):
        print(manifest.labels[prediction], "at exit", result.exit_index[row], "because of", result.reason[row])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
