"""PowerInfer's own binaries on vocabularies of either kind."""

from __future__ import annotations

import pytest

from sparsecast.export.config import VerifyConfig
from sparsecast.export.verify import verify


def details(result) -> dict[str, str]:
    return {c.name: c.detail for c in result.checks}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("dtype", "threshold", "bound"),
    [("f16", 0.0, 2e-3), ("f16", -1e30, 2e-3), ("q4_0", 0.0, 5e-3), ("q4_0", -1e30, 5e-3)],
)
def test_the_engine_computes_a_byte_level_model_as_we_do(
    dtype, threshold, bound, engine, byte_bundle, corpus
):
    bundle = byte_bundle(dtype, threshold)

    result = verify(VerifyConfig(bundle=bundle, corpus=str(corpus), engine=engine))

    assert result.ok, details(result)
    assert result.engine.perplexity == pytest.approx(result.engine.reference, rel=bound)
    assert "by token ids" in details(result)["engine perplexity"]
