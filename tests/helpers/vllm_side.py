"""Runs models in vLLM: `PYTHON vllm_side.py JOBS RESULTS`, both JSON. Needs vllm and nothing of this library.

A job has `model` (a directory), `overrides` (of its config.json), `prompts` (rows of ids), `max_tokens`,
`engine` (more arguments of `LLM`) and `adapters` (directories, one for each prompt, or none). Its result has
`tokens`, greedy, and `logprobs` of every prompt's tokens but the first; or `error`, the last line of what
vLLM raised.
"""

import json
import os
import sys

# Errors of an engine of its own process say that it failed, and not why.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def run(job):
    try:
        llm = LLM(
            job["model"],
            hf_overrides=job["overrides"],
            trust_remote_code=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            **job["engine"],
        )
    except Exception as error:
        return {"error": str(error).splitlines()[-1]}
    settings = SamplingParams(temperature=0, max_tokens=job["max_tokens"], prompt_logprobs=0)
    prompts = [{"prompt_token_ids": row} for row in job["prompts"]]
    adapters = [LoRARequest(path, i, path) for i, path in enumerate(job["adapters"], 1)]
    outputs = llm.generate(prompts, settings, lora_request=adapters or None)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [
            [
                at[token].logprob
                for at, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            ]
            for output in outputs
        ],
    }


if __name__ == "__main__":
    jobs_file, results_file = sys.argv[1:]
    with open(jobs_file) as file:
        jobs = json.load(file)
    results = [run(job) for job in jobs]
    with open(results_file, "w") as file:
        json.dump(results, file)
