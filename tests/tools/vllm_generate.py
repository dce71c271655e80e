"""Generate greedily by vLLM, in a process of its own: (job.json, result.json) as arguments.

A job has the fields `prompts` (lists of token ids), `tokens` to generate for each, and `options` of
`vllm.LLM`. The result has the ids and their log-probabilities.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(**job["options"])
    params = SamplingParams(
        temperature=0, max_tokens=job["tokens"], logprobs=0, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    outputs = [found.outputs[0] for found in llm.generate(prompts, params, use_tqdm=False)]
    ids = [list(found.token_ids) for found in outputs]
    result = {
        "ids": ids,
        "logprobs": [
            [step[number].logprob for number, step in zip(row, found.logprobs, strict=True)]
            for row, found in zip(ids, outputs, strict=True)
        ],
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
