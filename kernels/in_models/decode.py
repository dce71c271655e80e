"""Greedy decoding of one sequence with a static cache; on CUDA a compiled step in one CUDA graph.

The step reads its token and its position from the device and writes the next ones there, so a graph
of it runs again and again without the host.

Shape letters: S prompt, N new tokens.
"""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache

WARM_UP = 3


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """How a call hands its cache over: transformers renamed past_key_values in 5.24."""
    takes = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in takes else "past_key_values": cache}


class Decoder:
    """Decodes the same prompt as often as wanted.

    Args:
        prompt_S: int64 ids.
        tokens: N, at least 2.
    """

    def __init__(self, model: PreTrainedModel, prompt_S: Tensor, tokens: int) -> None:
        self._model: Any = model
        self._prompt_1S = prompt_S[None].to(model.device)
        self._cache: Any = StaticCache(
            config=model.config, max_cache_len=len(prompt_S) + tokens + WARM_UP
        )
        self._options = {**with_cache(model, self._cache), "use_cache": True}
        self._token_11 = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self._place_1 = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._out_N = torch.zeros(tokens + WARM_UP, dtype=torch.int64, device=model.device)
        self._forward: Any = model
        self._graph: torch.cuda.CUDAGraph | None = None
        if model.device.type == "cuda":
            self._forward = torch.compile(model, fullgraph=True, dynamic=False)
            self._capture()

    @torch.no_grad()
    def run(self) -> tuple[list[int], float]:
        """The N tokens behind the prompt, and the seconds that all but the first of them took."""
        self._begin()
        count = len(self._out_N) - WARM_UP
        self._wait()
        start = time.perf_counter()
        for _ in range(count - 1):
            self._graph.replay() if self._graph is not None else self._step()
        self._wait()
        seconds = time.perf_counter() - start
        return self._out_N[:count].tolist(), seconds

    def _begin(self) -> None:
        """The prompt, which gives the first token."""
        self._cache.reset()
        self._place_1.zero_()
        output = self._model(self._prompt_1S, **self._options)
        self._take(output.logits)

    def _step(self) -> None:
        output = self._forward(self._token_11, **self._options)
        self._take(output.logits)

    def _take(self, logits_1SV: Tensor) -> None:
        self._token_11.copy_(logits_1SV[:, -1].argmax(-1, keepdim=True))
        self._out_N.index_copy_(0, self._place_1, self._token_11[0])
        self._place_1.add_(1)

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

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
