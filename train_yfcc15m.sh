#!/usr/bin/env bash
# Train CLIP on YFCC15M with online sample selection; `bash train_yfcc15m.sh -h` lists what can be set.
# The number of epochs is not published for this set; 20 as for CC12M, which is of nearly the same size.
set -euo pipefail

DATASET=yfcc15m
DEFAULT_EPOCHS=20
FETCH="YFCC15M as shards: img2dataset with the list of OpenAI's subset,
https://github.com/openai/CLIP/blob/main/data/yfcc100m.md."
# shellcheck source=scripts/train_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/train_common.sh"
