#!/usr/bin/env bash
# Train CLIP on CC12M with online sample selection; `bash train_cc12m.sh -h` lists what can be set.
# Published: 20 epochs.
set -euo pipefail

DATASET=cc12m
DEFAULT_EPOCHS=20
FETCH="CC12M as shards: the data set pixparse/cc12m-wds on Hugging Face, or img2dataset with the list of
https://github.com/google-research-datasets/conceptual-12m."
# shellcheck source=scripts/train_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/train_common.sh"
