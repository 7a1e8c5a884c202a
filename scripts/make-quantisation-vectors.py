#!/usr/bin/env python3
"""Writes testdata/quantisation/vectors.json: stored blocks and the numbers behind them.

Needs the PyPI package `gguf` (the ggml project's own, with numpy). Run from the repository's
root: python3 scripts/make-quantisation-vectors.py
Bytes are random but for the F16 scales, which are set to moderate numbers. The numbers are given
as the hex digits of their little-endian F32 bytes, so that tests compare them bit for bit.
"""

import json
import pathlib

import gguf
import numpy as np

BLOCKS = 2
SEED = 20260

# Where the F16 fields lie in a block.
HALVES = {
    "F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "IQ4_NL": [0], "IQ4_XS": [0], "BF16": [], "MXFP4": [],
}


def main():
    random = np.random.default_rng(SEED)
    vectors = []
    for name, halves in HALVES.items():
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = BLOCKS if elements > 1 else 32
        stored = random.integers(0, 256, (blocks, size), dtype=np.uint8)
        for offset in halves:
            scales = random.normal(0, 0.1, blocks).astype("<f2")
            stored[:, offset:offset + 2] = scales.view(np.uint8).reshape(blocks, 2)
        if name == "BF16":
            numbers = random.normal(0, 10, blocks).astype("<f4").view(np.uint8).reshape(blocks, 4)
            stored = numbers[:, 2:].copy()
        if name == "MXFP4":
            stored[:, 0] = random.integers(120, 136, blocks)
        numbers = gguf.dequantize(stored, kind).astype("<f4")
        vectors.append({
            "type": name,
            "stored": stored.tobytes().hex(),
            "numbers": numbers.tobytes().hex(),
        })
    path = pathlib.Path("testdata/quantisation/vectors.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(vectors, indent=1) + "\n", encoding="ascii")


main()
