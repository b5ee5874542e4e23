"""Measures what attention allocates: `python flash_peak.py VERSION:LENGTH:HEADS:KV_HEADS ...` prints bytes per case.

Run in a process of its own. The figure is the peak of the resident set during one causal forward and backward pass
(head size 32, float32), above what was resident with the inputs in place.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from hasten.attention.flash_attention import flash_attention
from hasten.attention.flash_attention2 import flash_attention2


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def standard(q, k, v, causal):
    """Scores and weights written out, as the paper's baseline does."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ v


def peak(version: str, length: int, heads: int, kv_heads: int) -> int:
    attention = {"standard": standard, "1": flash_attention, "2": flash_attention2}[version]

    def inputs(tokens: int) -> list[torch.Tensor]:
        return [torch.randn(1, h, tokens, 32, requires_grad=True) for h in (heads, kv_heads, kv_heads)]

    attention(*inputs(64), causal=True).sum().backward()
    q, k, v = inputs(length)
    dout = torch.randn_like(q)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    attention(q, k, v, causal=True).backward(dout)
    return status("VmHWM") - before


def main(cases: list[str]) -> None:
    """Each case in a fork, so that no case finds memory that another has left."""
    torch.set_num_threads(1)
    for case in cases:
        version, *numbers = case.split(":")
        child = os.fork()
        if child == 0:
            print(case, peak(version, *map(int, numbers)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{case} failed")


def peaks(*cases: str) -> list[int]:
    """Bytes of each case, measured in processes of their own."""
    command = [sys.executable, __file__, *cases]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [int(line.split()[1]) for line in out.splitlines()]


if __name__ == "__main__":
    main(sys.argv[1:])
