"""lm-eval's Hugging Face model, with one BOS in front of whatever the model reads.

Stock `HFLM` asks the tokenizer to add BOS, so it depends on the tokenizer's files: some add none,
some add EOS as well, and in a rolling window a tokenizer's BOS comes on top of lm-eval's. Here text
is encoded without special tokens, and BOS is put in front of every context and rolling window; it
stays there when a text is cut on the left. A tokenizer without BOS (Qwen's) follows lm-eval's rule:
contexts stand alone, and EOS is the prefix of an empty context and of a text's first window.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import embedding_rows, max_positions
from sparsecast.core.text.tokens import check_ids, with_bos
from sparsecast.integrations.lm_eval.token_rows import check_row, cut_behind_bos


class OneBosLM(HFLM):  # type: ignore[misc]
    """A loaded causal LM for lm-eval: loglikelihood, loglikelihood_rolling and generate_until.

    Probabilities are computed in float32 from logits of the model's dtype.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            batch_size: Requests per forward pass, or lm-eval's auto.
            max_batch_size: The most that auto tries.
            max_length: Tokens that the model reads at once, BOS included; unset: as many as it
                supports.

        Raises:
            InputError: A tokenizer with neither BOS nor EOS; fewer than 2 tokens at once.
        """
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None and eos is None:
            raise InputError(
                f"{tokenizer.name_or_path}: the tokenizer has neither BOS nor EOS, and a text's "
                "first token needs one in front; name one in tokenizer_config.json"
            )
        self.rows = embedding_rows(model)
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= self.rows:
            tokenizer.pad_token_id = bos if eos is None else eos
        limit = max_positions(model)
        if max_length is None and math.isfinite(limit):
            max_length = int(limit)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            softmax_dtype="float32",
        )
        if self.max_length < 2:
            raise InputError(f"max_length: must be at least 2, got {self.max_length}")
        self.cut = 0
        """Requests whose beginning did not fit, so far."""
        self._templated = False

    @property
    def eot_token_id(self) -> int:
        """EOS; BOS of a tokenizer that has no EOS."""
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        return int(bos if eos is None else eos)

    @property
    def _bos(self) -> int | None:
        bos: int | None = self.tokenizer.bos_token_id
        return bos

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write a chat as lm-eval does, and take BOS within texts for the template's own."""
        self._templated = True
        return str(super().apply_chat_template(chat_history, add_generation_prompt))

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        """Return a text's ids with one BOS in front; without it if `add_special_tokens` is False.

        Special tokens that the text spells are special, as in lm-eval, unless it spells BOS in its
        middle: then it is taken as plain text.
        """
        ids = self._encode(string, self._spells_bos(string))
        if add_special_tokens is False and self._bos is not None:
            ids = ids[1:]
        return cut_behind_bos(ids, left_truncate_len, self._bos) if left_truncate_len else ids

    def _encode(self, text: str, literal: bool) -> list[int]:
        bos = self.tokenizer.bos_token
        while literal and text.startswith(bos):
            text = text[len(bos) :]
        options = {"add_special_tokens": False, "split_special_tokens": literal, "verbose": False}
        ids = with_bos(self.tokenizer, self.tokenizer(text, **options)["input_ids"])
        if ids:
            check_ids(ids, self.tokenizer, self.rows)
        return ids

    def _spells_bos(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        if bos is None or self._templated or bos not in text:
            return False
        return self._bos in self._encode(text, literal=False)[1:]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Split the ids of both texts together behind those of the context, as lm-eval does."""
        front = context.rstrip()
        whole = front + context[len(front) :] + continuation
        literal = self._spells_bos(whole)
        ids, front_ids = self._encode(whole, literal), self._encode(front, literal)
        return front_ids or [self.prefix_token_id], ids[len(front_ids) :]

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts, cut on the left behind BOS, and pad them on the left.

        Returns:
            Ids and attention mask, int64 (B, S).
        """
        assert padding_side == "left"
        rows = []
        for text in strings:
            ids = self.tok_encode(text) or [self.prefix_token_id]
            rows.append(self._fit(ids, left_truncate_len or self.max_length))
        width = max(map(len, rows))
        ids_BS = torch.full((len(rows), width), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask_BS = torch.zeros_like(ids_BS)
        for row, ids, mask in zip(rows, ids_BS, mask_BS, strict=True):
            ids[width - len(row) :] = torch.tensor(row)
            mask[width - len(row) :] = 1
        return ids_BS, mask_BS

    def _fit(self, ids: list[int], room: int) -> list[int]:
        self.cut += len(ids) > room
        return cut_behind_bos(ids, room, self._bos)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Sum the log probabilities of whole texts, window by window, each behind a BOS."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            found = self._windows(self.tok_encode(request.args[0], add_special_tokens=False))
            windows += [(None, context, predicted) for context, predicted in found]
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = []
        for request, count in zip(requests, counts, strict=True):
            sums.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[-1])
        return sums

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """Return lm-eval's (context, predicted) windows; BOS takes a place in all of several."""
        behind_bos = self._bos is not None and len(ids) > self.max_length
        pairs = get_rolling_token_windows(
            token_list=ids,
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length - behind_bos,
            context_len=1,
        )
        windows = [make_disjoint_window(pair) for pair in pairs]
        if behind_bos:
            windows[1:] = [([self._bos, *context], rest) for context, rest in windows[1:]]
        return windows

    def _loglikelihood_tokens(
        self,
        requests: list[Any],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score (texts, context, continuation) with rows cut and checked.

        Raises:
            InputError: An answer longer than the model reads; a probability that is not a number.
        """
        fitted = []
        for text, context, continuation in requests:
            context = self._fit(context, self.max_length + 1 - len(continuation))
            check_row([*context, *continuation], self._bos, inside=self._templated)
            fitted.append((text, context, continuation))
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            fitted, disable_tqdm=disable_tqdm, override_bs=override_bs
        )
        if any(math.isnan(value) for value, _ in answers):
            raise InputError(
                f"{self.model.config.name_or_path}: a probability is not a number in "
                f"{str(self.model.dtype).removeprefix('torch.')}, so the model itself overflows; "
                "run it with --dtype bfloat16 or float32, and check its weights"
            )
        return answers

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Generate from checked rows."""
        for ids, mask in zip(context.tolist(), options["attention_mask"].tolist(), strict=True):
            row = [token for token, real in zip(ids, mask, strict=True) if real]
            check_row(row, self._bos, inside=self._templated)
        generated: Tensor = super()._model_generate(context, max_length, stop, **options)
        return generated
