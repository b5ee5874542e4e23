"""What a request costs: time of arithmetic and time of reading its cached keys and values.

Source: Zhao et al., "BlendServe: Optimizing Offline Inference for Auto-regressive Large Models with Resource-aware
Batching", 2024, arXiv 2411.16102, section 4 (formulas reconstructed). Reading weights is a cost of the step, not of a
request, and is left out; so the ratio of the two says which requests balance each other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hasten.core.errors import ArtefactError
from hasten.kernels.peak import read_bandwidth
from hasten.lm.scheduling.latency import described, kept_curve

if TYPE_CHECKING:
    from hasten.core.artefact import ArtefactStore
    from hasten.lm.runner import Runner

VERSION = 1


@dataclass(frozen=True)
class Rates:
    """Seconds of one unit of each resource.

    token: the linear layers of one token. pair: attention of one prompt token to one before it. read: one cached token
    that one decode row reads.
    """

    token: float
    pair: float
    read: float

    def prompt(self, start: int, stop: int) -> float:
        """Seconds to compute prompt tokens [start, stop), those before them being cached."""
        return self.token * (stop - start) + self.pair * (stop * stop - start * start) / 2

    def decode(self, output: float) -> float:
        """Seconds of arithmetic to decode ``output`` tokens; attention is bound by reading."""
        return self.token * output

    def memory(self, prompt: int, output: float) -> float:
        """Seconds to read keys and values while ``output`` tokens are decoded after ``prompt`` ones."""
        return self.read * (prompt * output + output * output / 2)


NOMINAL = Rates(token=2e-3, pair=6.5e-7, read=1e-6)
"""Of a small model on a small machine: what orders requests until the machine is measured."""


def measured(store: ArtefactStore, slug: str, runner: Runner, limit: int) -> Rates:
    """The rates of this runner on this machine, measured once and kept.

    Linear layers: the slope of the step latency. Attention: in proportion to its operations. Reading: bytes of a cached
    token over the bandwidth of memory. Raises what `kept_curve` raises.
    """
    _, token = kept_curve(store, slug, runner, limit).line()
    config, cache = runner.decoder.config, runner.cache
    shape, hidden = config.shape, config.hidden_size
    weights = hidden * shape.size * (2 * shape.heads + 2 * shape.kv_heads)
    weights += 3 * hidden * config.intermediate_size
    pair = token * 4 * shape.heads * shape.size / (2 * weights)
    bandwidth = _bandwidth(store, slug, runner)
    return Rates(max(token, 1e-9), max(pair, 1e-12), cache.page_bytes / cache.page_size / bandwidth)


def _bandwidth(store: ArtefactStore, slug: str, runner: Runner) -> float:
    def write(folder: Path) -> None:
        data = {"bytes_per_second": read_bandwidth(3)}
        (folder / "bandwidth.json").write_text(json.dumps(data) + "\n", encoding="utf-8")

    made_from = {"version": VERSION, "cpu": described(runner)["cpu"], "threads": torch.get_num_threads()}
    folder = store.build(f"{slug}-bandwidth", made_from, write)
    try:
        found = float(json.loads((folder / "bandwidth.json").read_text(encoding="utf-8"))["bytes_per_second"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ArtefactError(f"{folder} holds no bandwidth ({error}); delete it") from None
    if not found > 0:
        raise ArtefactError(f"{folder} holds no bandwidth; delete it")
    return found
