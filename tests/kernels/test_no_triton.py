"""Without Triton, as on macOS and Windows, sparse FFNs run in plain torch on the CPU."""

from __future__ import annotations

CODE = """
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, NoTriton())
assert not [name for name in sys.modules if name.startswith("sparsecast.kernels")]
for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
    del sys.modules[name]
os.environ["TRITON_INTERPRET"] = "1"
from sparsecast.cli.bench.kernels import BenchKernelsConfig, bench_kernels
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.location import TINY_PROSPARSE
from sparsecast.kernels.in_models.sparse_ffn import SparseFFN, runs_kernels
from sparsecast.kernels.in_models.sparsify import sparsify_model
from sparsecast.kernels.ops.ffn import exact_ffn

model, _ = load_model(str(TINY_PROSPARSE), device="cpu", dtype="float32")
ids = torch.tensor([[1, 5, 9]])
with torch.no_grad():
    dense = model(ids).logits
    sparsify_model(model, policy="exact")
    sparse = model(ids).logits
ffns = [module for module in model.modules() if isinstance(module, SparseFFN)]
assert len(ffns) == model.config.num_hidden_layers
torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)
assert not runs_kernels(torch.zeros(1, dtype=torch.float16))
ffn = ffns[0].half().ffn
for call in (
    lambda: exact_ffn(torch.zeros(1, ffn.up_FD.shape[1]).half(), ffn),
    lambda: bench_kernels(BenchKernelsConfig()),
):
    try:
        call()
    except ValueError as error:
        print(error, file=sys.stderr)
"""


def test_models_run_and_kernels_say_what_is_missing(sparsecast_forked):
    done = sparsecast_forked(["--version"], CODE)
    _, told = done.communicate()
    assert done.returncode == 0, told
    assert "the kernels need Triton, which cannot be imported here; see `sparsecast doctor`" in told
    assert "bench kernels: this machine has no CUDA device" in told
