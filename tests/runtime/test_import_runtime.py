"""What importing the runtime drags in, seen in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

# "bindings" is cuda.bindings
FORBIDDEN = {
    "bindings",
    "torch",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "tokenizers",
    "rich",
    "transformers",
}


def modules_after(statements: str) -> set[str]:
    """Packages in a fresh interpreter after `statements`; of cuda, which cuda-bindings always loads, what is below."""
    code = f"{statements}\nimport sys\nprint(*{{name.removeprefix('cuda.').partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_runtime_imports_neither_torch_nor_a_backend() -> None:
    assert modules_after("import offramp.runtime").isdisjoint(FORBIDDEN)


def test_the_package_itself_imports_nothing_heavy() -> None:
    assert modules_after("import offramp").isdisjoint(FORBIDDEN | {"numpy"})
    assert modules_after("import offramp; assert offramp.__version__").isdisjoint(FORBIDDEN | {"numpy"})
    assert modules_after("from offramp import Policy").isdisjoint(FORBIDDEN)


def test_the_onnxruntime_engine_imports_onnxruntime_and_no_more() -> None:
    found = modules_after("import offramp.runtime.onnxruntime_engine") & FORBIDDEN
    assert found == {"onnxruntime"}


def test_only_the_door_to_cuda_imports_it() -> None:
    engine = "import offramp.runtime.tensorrt.engine, offramp.runtime.tensorrt.fake_plan"
    assert modules_after(engine).isdisjoint(FORBIDDEN)
    assert modules_after("import offramp.runtime.tensorrt.loaded_plan") & FORBIDDEN == {"bindings"}


@pytest.mark.parametrize("module", ["offramp.tuning.calibrate", "offramp.bundle", "offramp.policy", "offramp.trace"])
def test_what_else_ships_imports_nothing_heavy(module: str) -> None:
    assert modules_after(f"import {module}").isdisjoint(FORBIDDEN)


def test_building_engines_imports_no_torch() -> None:
    assert "torch" not in modules_after("import offramp.export.build_engine, offramp.export.tensorrt_builder")


def test_the_models_import_neither_onnx_nor_tensorrt() -> None:
    found = modules_after("import offramp.models.train, offramp.models.checkpoint")
    assert found.isdisjoint({"onnx", "onnxruntime", "tensorrt", "tensorrt_rtx"})


def test_help_imports_neither_torch_nor_onnx_nor_numpy() -> None:
    code = "from click.testing import CliRunner; from offramp.cli import main; CliRunner().invoke(main, ['--help'])"
    assert modules_after(code).isdisjoint(FORBIDDEN | {"numpy"})


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import offramp

    assert offramp.Policy.full_depth().limits == ()
    with pytest.raises(AttributeError, match="has no attribute 'Polcy'"):
        offramp.Polcy  # noqa: B018
