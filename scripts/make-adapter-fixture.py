#!/usr/bin/env python3
"""Writes testdata/glasslm/adapter.gguf: a LoRA adapter of GlassLM for tests, from a fixed seed.

    pip install gguf && scripts/make-adapter-fixture.py

Rank 2 on the queries and values of all four layers, as llama.cpp's convert_lora_to_gguf.py lays it
out. The numbers are random and small: answers change, and stay like the model's own.
"""
import numpy as np
from gguf import GGUFWriter

RANK, LAYERS, WIDTH, KEY_VALUE_WIDTH = 2, 4, 128, 64
random = np.random.default_rng(2026)
writer = GGUFWriter("testdata/glasslm/adapter.gguf", "llama")
writer.add_type("adapter")
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", 4.0)
for layer in range(LAYERS):
    for name, outputs in (("attn_q", WIDTH), ("attn_v", KEY_VALUE_WIDTH)):
        a = random.normal(0, 0.12, (RANK, WIDTH)).astype(np.float16)
        b = random.normal(0, 0.12, (outputs, RANK)).astype(np.float16)
        writer.add_tensor(f"blk.{layer}.{name}.weight.lora_a", a)
        writer.add_tensor(f"blk.{layer}.{name}.weight.lora_b", b)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
