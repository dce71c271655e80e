"""Greedy decoding of one sequence with a static cache; on CUDA, a compiled step in a CUDA graph.

The step reads its token and position from the device and writes the next ones there, so its graph
can be replayed without the host.

Shape letters: S prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache

WARM_UP = 3
"""Steps before a CUDA graph is captured."""


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """Return a cache as a keyword argument; transformers 5.24 renamed past_key_values."""
    parameters = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache}


class Decoder:
    """Decodes one prompt, any number of times.

    Args:
        prompt_S: int64 ids.
        tokens: New tokens N, at least 2.
    """

    def __init__(self, model: PreTrainedModel, prompt_S: Tensor, tokens: int) -> None:
        self._model: Any = model
        self._prompt_1S = prompt_S[None].to(model.device)
        self._cache: Any = StaticCache(
            config=model.config, max_cache_len=len(prompt_S) + tokens + WARM_UP
        )
        self._options = {**with_cache(model, self._cache), "use_cache": True}
        self._token_11 = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self._position_1 = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._out_N = torch.zeros(tokens + WARM_UP, dtype=torch.int64, device=model.device)
        self._forward: Any = model
        self._graph: torch.cuda.CUDAGraph | None = None
        if model.device.type == "cuda":
            self._forward = torch.compile(model, fullgraph=True, dynamic=False)
            self._capture()

    @torch.no_grad()
    def run(self) -> tuple[list[int], float]:
        """Return the N tokens after the prompt, and the seconds for all of them but the first."""
        self._begin()
        count = len(self._out_N) - WARM_UP
        self._synchronize()
        start = time.perf_counter()
        for _ in range(count - 1):
            self._graph.replay() if self._graph is not None else self._step()
        self._synchronize()
        seconds = time.perf_counter() - start
        return self._out_N[:count].tolist(), seconds

    def _begin(self) -> None:
        """Evaluate the prompt, which gives the first token."""
        self._cache.reset()
        self._position_1.zero_()
        output = self._model(self._prompt_1S, **self._options)
        self._store_token(output.logits)

    def _step(self) -> None:
        output = self._forward(self._token_11, **self._options)
        self._store_token(output.logits)

    def _store_token(self, logits_1SV: Tensor) -> None:
        self._token_11.copy_(logits_1SV[:, -1].argmax(-1, keepdim=True))
        self._out_N.index_copy_(0, self._position_1, self._token_11[0])
        self._position_1.add_(1)

    @torch.no_grad()
    def _capture(self) -> None:
        self._begin()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()

    def _synchronize(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
