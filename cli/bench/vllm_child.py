"""What `sparsecast bench vllm` times: one vLLM, alone in its process.

Arguments: when the process was started, by `time.monotonic`, which all processes share on Linux; a
JSON file with `options` of `vllm.LLM`, `prompts` as token ids, `tokens` to generate for each, and
`runs`; and the file for the result.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path


def main(started: str, job: str, result: str) -> None:
    import vllm
    from vllm import LLM, SamplingParams

    imported = time.monotonic()
    work = json.loads(Path(job).read_text("utf-8"))
    llm = LLM(**work["options"])
    ready = time.monotonic()
    params = SamplingParams(
        temperature=0, max_tokens=work["tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in work["prompts"]]
    rates = []
    for _ in range(1 + work["runs"]):  # the first warms up
        begin = time.perf_counter()
        made = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        rates.append(sum(len(one.outputs[0].token_ids) for one in made) / seconds)
    values = {
        "vllm": vllm.__version__,
        "import_s": imported - float(started),
        "start_s": ready - float(started),
        "tokens_per_s": statistics.median(rates[1:]),
    }
    Path(result).write_text(json.dumps(values), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
