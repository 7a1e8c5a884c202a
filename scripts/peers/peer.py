"""What the peers of `slm bench serve` have in common: the options of `slm serve` that they take, and ending
with whoever started them."""

import argparse
import os
import sys
import threading


def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for name in ("context", "parallel", "threads", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


def end_with_parent():
    def wait():
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def answers_at(url):
    print(url, flush=True)
