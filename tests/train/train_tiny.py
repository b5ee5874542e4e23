"""A training run of half a second: a tiny decoder on a made-up language with something to learn."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hasten.models.config import DecoderConfig, HeadShape, RopeSpec
from hasten.train.data.packed import PackedTokens, Stage
from hasten.train.optimizer import AdamWSettings
from hasten.train.trainer import StepReport, Trainer, TrainSettings

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    shape=HeadShape(heads=2, kv_heads=2, size=16),
    max_positions=64,
    rope=RopeSpec(theta=10000.0, size=16),
    tie_embeddings=True,
    bos_id=0,
    eos_ids=(0,),
)
SETTINGS = TrainSettings(
    stages=(Stage(24, 4, 16), Stage(6, 1, 64)),
    seed=3,
    optimizer=AdamWSettings(peak=1e-2, warmup=4),
    evaluate_every=10,
    save_every=4,
)


def chain(length: int, seed: int) -> PackedTokens:
    """Tokens below 20 of which each mostly decides the next."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.rand(length, generator=random)
    jump = torch.randint(20, (length,), generator=random)
    token, out = 1, []
    for i in range(length):
        token = (token * 7 + 3) % 20 if noise[i] < 0.9 else int(jump[i])
        out.append(token)
    return PackedTokens(torch.tensor(out))


def trainer(folder: Path, settings: TrainSettings = SETTINGS) -> Trainer:
    return Trainer(CONFIG, settings, chain(4000, 1), chain(400, 2).head(8, 16), folder)


def main() -> None:
    """Train in the folder of the first argument, and say every step aloud: to be killed."""
    torch.set_num_threads(1)

    def tell(report: StepReport) -> None:
        print(report.step, flush=True)

    trainer(Path(sys.argv[1])).run(tell)


if __name__ == "__main__":
    main()
