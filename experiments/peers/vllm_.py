"""vLLM's CPU build, a LoRARequest for every prompt; without --adapters the base; see protocol.py.

vLLM 0.32 loads LoRA on GPTBigCode's ``c_attn`` and answers with the base model, which the check finds;
with --target c_attn it refuses to start.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import protocol

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; 32 rows of 128 tokens take less than 0.2.
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
    # By default vLLM leaves a core to its front end, half of a machine of two.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(say: Callable[[dict[str, Any]], None]) -> None:
    options = protocol.read_options(
        target=dict(help="wrap these modules alone for adapters, which is faster than all")
    )
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    count = len(options.adapters)
    lora: dict[str, Any] = {}
    if count:
        ranks = dict(max_loras=count, max_cpu_loras=count, max_lora_rank=8)
        targets = options.rest.target.split(",") if options.rest.target else None
        lora = dict(enable_lora=True, lora_target_modules=targets, **ranks)
    engine = LLM(
        model=str(options.model),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=options.max_model_len,
        max_num_seqs=max(options.batches),
        max_num_batched_tokens=options.max_batched_tokens,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        **lora,
    )
    requests = {
        name: LoRARequest(name, number, str(folder))
        for number, (name, folder) in enumerate(options.adapters.items(), 1)
    }

    def generate(prompts: list[list[int]], names: protocol.Names, n: int) -> list[list[int]]:
        sampling = SamplingParams(
            temperature=0, max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False
        )
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampling,
            lora_request=[requests[name] if name else None for name in names] if count else None,
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    packages = protocol.versions("vllm-cpu", "torch")
    protocol.serve_generation(say, options, packages, generate)


if __name__ == "__main__":
    protocol.run(main)
