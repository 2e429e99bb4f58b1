"""The peers on the same shapes: transformers' GPTBigCode, an adapter for every row.

Alone, with a LoRA of every row's own as two ``torch.bmm``, and with PEFT's mixed batch
(``adapter_names``).

    torch_model PRESET LAYERS ROWS RANK

``ms_step`` is the difference of a long and a short generation, so that the prompt's pass is left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from experiments.gpu.items import Stage, main, require


def stage(own: Stage, words: list[str]) -> None:
    preset, *numbers = words
    layers, rows, rank = map(int, numbers)
    prompt, few, many = (8, 1, 3) if own.rehearse else (448, 8, 40)
    about: dict[str, Any] = {"preset": preset, "rows": rows, "prompt": prompt}
    try:
        require("torch", "transformers")
        run = Peers(preset, layers, rows, rank, (prompt, few, many))
    except Exception as reason:
        name = "skipped" if type(reason).__name__ == "Skip" else "failed"
        own.put("generate", **about, **{name: f"{reason}"})
        return
    about |= {"layers": layers or run.net.config.n_layer, "need_s": 0 if own.rehearse else 12}
    own.attempt("generate", run.base, peer="transformers", kind="none", rank=0, **about)
    own.attempt("generate", run.batched, peer="torch.bmm", kind="lora", rank=rank, **about)
    about["need_s"] = 0 if own.rehearse else 30
    own.attempt("generate", run.peft, peer="PEFT adapter_names", kind="lora", rank=rank, **about)


class Peers:
    """One model and the three ways to run it."""

    def __init__(
        self, preset: str, layers: int, rows: int, rank: int, lengths: tuple[int, int, int]
    ):
        import torch

        from experiments.gpu import on_torch
        from experiments.gpu.torch_models import gpt_big_code

        self.rows, self.rank = rows, rank
        prompt, self.few, self.many = lengths
        self.net: Any = gpt_big_code(
            preset, layers, prompt + self.many, on_torch.HALF, on_torch.DEVICE
        ).eval()
        self.net.generation_config.eos_token_id = self.net.generation_config.pad_token_id = None
        shape = (rows, prompt)
        self.ids = torch.randint(1, self.net.config.vocab_size, shape, device=on_torch.DEVICE)
        on_torch.wait()

    def base(self, **more: Any) -> Mapping[str, Any]:
        """Greedy tokens, all rows at once."""
        for tokens in (self.few, self.many):  # The longer one has allocations of its own.
            self._generate(tokens, more)
        short, long = (
            statistics.median(self._generate(tokens, more) for _ in range(3))
            for tokens in (self.few, self.many)
        )
        step = (long - short) / (self.many - self.few)
        return {
            "ms_step": 1e3 * step,
            "tok_s": self.rows / step,
            "first_s": short - self.few * step,
        }

    def _generate(self, tokens: int, more: Mapping[str, Any]) -> float:
        import torch

        from experiments.gpu import on_torch

        on_torch.wait()
        began = time.perf_counter()
        with torch.inference_mode():
            self.net.generate(
                input_ids=self.ids, attention_mask=torch.ones_like(self.ids), max_new_tokens=tokens,
                min_new_tokens=tokens, do_sample=False, use_cache=True, **more,
            )  # fmt: skip
        on_torch.wait()
        return time.perf_counter() - began

    def batched(self) -> Mapping[str, Any]:
        """c_attn with a LoRA of every row's own, as the paper's baseline has it."""
        import torch

        from experiments.gpu import on_torch

        rows, rank = self.rows, self.rank

        class Batched(torch.nn.Module):
            def __init__(self, plain: Any):
                super().__init__()
                self.plain = plain
                outputs, inputs = plain.weight.shape
                self.down = inputs**-0.5 * on_torch.normal(rows, inputs, rank)
                self.up = 0.01 * on_torch.normal(rows, rank, outputs)

            def forward(self, x: Any) -> Any:
                return self.plain(x) + torch.bmm(torch.bmm(x, self.down), self.up)

        blocks = self.net.transformer.h
        plain = [block.attn.c_attn for block in blocks]
        try:
            for block in blocks:
                block.attn.c_attn = Batched(block.attn.c_attn)
            return self.base()
        finally:
            for block, own in zip(blocks, plain):
                block.attn.c_attn = own

    def peft(self) -> Mapping[str, Any]:
        """PEFT with an adapter for every row."""
        require("peft")
        import torch
        from peft import LoraConfig, get_peft_model

        from experiments.gpu import on_torch

        def config() -> Any:
            return LoraConfig(
                r=self.rank, lora_alpha=self.rank, target_modules=["c_attn"], task_type="CAUSAL_LM",
                init_lora_weights=False,
            )  # fmt: skip

        began = time.perf_counter()
        names = [f"a{row}" for row in range(self.rows)]
        with torch.device(on_torch.DEVICE):
            net = get_peft_model(
                self.net, config(), adapter_name=names[0], autocast_adapter_dtype=False
            )
            for name in names[1:]:
                net.add_adapter(name, config())
        self.net = net.to(on_torch.HALF).eval()
        on_torch.wait()
        made_s = time.perf_counter() - began
        return {"made_s": made_s, **self.base(adapter_names=names)}


if __name__ == "__main__":
    main(stage)
