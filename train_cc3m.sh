#!/usr/bin/env bash
# Train CLIP on CC3M with online sample selection; `bash train_cc3m.sh -h` lists what can be set.
# Published: 40 epochs. With 8 GPUs that is little more than the 10,000 steps in which the learning rate warms up;
# --warmup 2000 shortens them.
set -euo pipefail

DATASET=cc3m
DEFAULT_EPOCHS=40
FETCH="CC3M as shards: the data set pixparse/cc3m-wds on Hugging Face, or img2dataset with the list of
https://ai.google.com/research/ConceptualCaptions."
# shellcheck source=scripts/train_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/train_common.sh"
