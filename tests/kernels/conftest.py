"""Where kernels run, and memory that tells when one of them reads or writes what is not its own.

Whatever a kernel's wrapper allocates holds NaN (or the largest integer, whose bits are a NaN in
float32), inside bands of the same that are checked afterwards; weights and inputs lie in such bands
as well.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from sparsecast.kernels.ops import active_list, gate, gate_up, predictor
from sparsecast.kernels.ops.launch import INTERPRETED, rounded_threshold

BAND = 64
"""Elements on either side."""
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.int8: 2e-3}
"""Upper bounds of max |out - ref| / max |ref|; int8 stands for inputs in q8_0."""
real_empty = torch.empty


def poison(dtype: torch.dtype) -> float | int:
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).max


def is_poison(tensor: torch.Tensor) -> bool:
    if tensor.dtype.is_floating_point:
        return bool(tensor.isnan().all())
    return bool((tensor == poison(tensor.dtype)).all())


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter():
    """Triton's interpreter searches triton.language for its builtins at every call of a function,
    which takes longer than the call. They are always the same, so find them once."""
    places = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    builtins = {
        place: [(name, m) for name, m in inspect.getmembers(place) if tl.core.is_builtin(m)]
        for place in places
    }

    def patch_builtin(place, *options):
        for name, member in builtins[place]:
            if getattr(place, name) is member:  # not yet replaced
                interpreter._patch_attr(place, name, member, *options)

    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        yield


@pytest.fixture(autouse=True)
def _banded_memory(monkeypatch):
    """Every `torch.empty` of a test."""
    buffers = []

    def empty(*size, **options):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = math.prod(shape)
        buffer = real_empty(count + 2 * BAND, **options)
        if type(buffer) is not torch.Tensor or buffer.is_meta:  # torch.compile asks for shapes
            return real_empty(shape, **options)
        buffer.fill_(poison(buffer.dtype))
        buffers.append((buffer, count))
        return buffer[BAND : BAND + count].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    for buffer, count in buffers:
        assert is_poison(buffer[:BAND]), "written before a buffer's begin"
        assert is_poison(buffer[BAND + count :]), "written behind a buffer's end"


@pytest.fixture
def banded(device):
    """A copy of a tensor on the device, in a band of poison."""

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        inside = torch.empty(*tensor.shape, dtype=tensor.dtype, device=device)
        return inside.copy_(tensor)

    return copy


@pytest.fixture
def matrix(banded):
    """Random weights whose products with inputs of order 1 are of order 1."""

    def make(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return banded((torch.randn(rows, columns) * columns**-0.5).to(dtype))

    return make


@pytest.fixture
def values():
    """(T, K) float32: what the codes of an input stand for."""

    def of(rounded_TBS: torch.Tensor) -> torch.Tensor:
        code_TBK = rounded_TBS[..., :8].contiguous().view(torch.int8)
        return (code_TBK * rounded_TBS[..., 8:9].view(torch.float32)).flatten(1)

    return of


@pytest.fixture
def near():
    """max |out - ref| / max |ref| below what the dtype allows; NaN never is."""

    def check(got: torch.Tensor, want: torch.Tensor) -> None:
        assert got.shape == want.shape
        scale = float(want.abs().max()) if want.numel() else 0.0
        error = float((got.double() - want.double()).abs().max()) if want.numel() else 0.0
        assert error <= LIMITS[got.dtype] * scale, f"off by {error}, of {scale}"

    return check


@pytest.fixture
def decided():
    """What the whole FFN must give, in float64, for the decisions that its kernels make themselves.

    Those are compared one by one: they may differ only where the number that decides is within
    rounding of the threshold.
    """

    def check(got_TF, number_TF, cut, dtype) -> None:
        near_by = LIMITS[dtype] * float(number_TF.abs().max())
        far_off = (got_TF != (number_TF >= cut)) & ((number_TF - cut).abs() > near_by)
        assert not far_off.any()

    def reference(x_TD, ffn, z_TD=None, named=None):
        first = ffn.up_FD if ffn.gate_FD is None else ffn.gate_FD
        cut = rounded_threshold(ffn.threshold, x_TD.dtype) if ffn.act == "fatrelu" else 0.0
        token_T1 = torch.arange(len(x_TD), device=x_TD.device)[:, None]
        if named is None:
            act_FT, selected = gate.gate(x_TD, first, ffn.up_bias_F, cut)
            source = gate_up.DenseGate(act_FT)
            selected_TF = act_FT.T != 0
        else:
            selected, chosen_F = predictor.predict(z_TD, *named[:3])
            source = gate_up.SelectedGate(first, ffn.up_bias_F, cut, chosen_F)
            selected_TF = (chosen_F >> token_T1) & 1 == 1
            logits_TF = predictor.reference(z_TD, named.fc1_RD, named.fc2_FR)[1]
            kept = predictor.input_dtype(named.fc1_RD)
            check(selected_TF, logits_TF, named.threshold, kept)
        up_FD = None if ffn.gate_FD is None else ffn.up_FD
        relu_up, squared = ffn.act == "drelu", ffn.act == "relu2"
        row_K, x1_KT = active_list.unpacked(
            gate_up.gate_up(x_TD, selected, source, up_FD, relu_up=relu_up, squared=squared)
        )
        fires_TF = torch.zeros_like(selected_TF)
        fires_TF[:, row_K.long()] = x1_KT.T != 0

        gate_TF = x_TD.double() @ first.double().T
        if ffn.up_bias_F is not None:
            gate_TF += ffn.up_bias_F.double()
        if named is None:
            check(selected_TF, gate_TF, cut, x_TD.dtype)
        x1_TF = gate_TF.to(x_TD.dtype).double()
        if squared:
            x1_TF = x1_TF**2
        if up_FD is not None:
            up_TF = x_TD.double() @ up_FD.double().T
            x1_TF = x1_TF * (up_TF.relu() if relu_up else up_TF)
        counts_TF = selected_TF & (x1_TF != 0)  # a product of 0 fires or not, it is the same
        check(fires_TF[counts_TF], gate_TF[counts_TF], cut, x_TD.dtype)
        assert not fires_TF[~selected_TF].any()
        x1_TF = x1_TF * fires_TF
        if ffn.x1_norm_F is not None:
            mean_T1 = (x1_TF**2).sum(1, keepdim=True) / x1_TF.shape[1]
            x1_TF = ffn.x1_norm_F.double() * x1_TF / (mean_T1 + ffn.x1_norm_eps).sqrt()
        y_TD = x1_TF @ ffn.down_FD.double()
        if ffn.down_bias_D is not None:
            y_TD += ffn.down_bias_D.double()
        return y_TD.to(x_TD.dtype), int(selected_TF.any(0).sum())

    return reference
