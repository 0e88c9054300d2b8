"""FP16 lowering where AutoCast alone would do something else."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from offramp.export.graph import weight_share
from offramp.export.lower import fp16_from_segment


def test_large_token_ids_do_not_keep_their_table_in_fp32() -> None:
    table = np.sin(np.arange(30_000 * 8, dtype=np.float32)).reshape(30_000, 8)
    weight = np.cos(np.arange(16, dtype=np.float32)).reshape(8, 2)
    nodes = [
        helper.make_node("Gather", ["ids", "table"][::-1], ["words"], "look up"),
        helper.make_node("MatMul", ["words", "weight"], ["logits"], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "segment_00",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["rows"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 2])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    lowered = fp16_from_segment(model, [{"ids": np.array([29_999, 7, 25_000])}])
    assert weight_share(lowered, TensorProto.FLOAT16) == 1.0
