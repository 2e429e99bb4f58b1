"""Two adapters in one run, each on its own text, and the first of them at work.

python examples/train_two_adapters.py [DIRECTORY]
"""

import sys
from pathlib import Path

import flora_jax

place = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/two")
texts = {"squares": "x = x * x\n", "sums": "x = x + x\n"}
for name, line in texts.items():
    (place / "data" / name).mkdir(parents=True, exist_ok=True)
    (place / "data" / name / "text.py").write_text(line * 200)

options = flora_jax.TrainOptions(
    model="mini",
    kind="flora",
    rank=2,
    data={name: str(place / "data" / name) for name in texts},
    steps=4,
    batch_size=2,
    seq_len=64,
)
folders = flora_jax.train(options, place / "run")
with flora_jax.LLM("mini", adapters={name: str(folder) for name, folder in folders.items()}) as llm:
    for completion in llm.generate(
        "x = ", flora_jax.SamplingParams(max_tokens=8), adapters="squares"
    ):
        print(completion.adapter, repr(completion.text))
