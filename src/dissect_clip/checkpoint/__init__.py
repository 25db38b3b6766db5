"""Checkpoints: what is in them, how they are written so that a crash leaves none half written, and how they are read.

    checkpoints/epoch_7.pt                    OpenCLIP's keys, and "dissect" with all else that survives a restart
    checkpoints/epoch_7.scores.safetensors    the score table, which can be gigabytes; only with --select
    checkpoints/epoch_7_step_1200.pt          by steps or minutes: 7 epochs are complete, 1200 steps done in all
    checkpoints/epoch_latest.pt               with --save-most-recent

The scores are in place before the .pt that names their file, and both hold the same random token. No file is written
over one that a complete .pt needs, so whatever moment a process dies at, every .pt has its scores. "epoch" counts
complete epochs. Everything is read with ``weights_only=True``.
"""

from __future__ import annotations

from dissect_clip.checkpoint.format import Checkpoint, pack
from dissect_clip.checkpoint.policy import Moment, Plan, Policy
from dissect_clip.checkpoint.read import load_checkpoint
from dissect_clip.checkpoint.resume import find_latest, find_resume, restore
from dissect_clip.checkpoint.saver import Saver
from dissect_clip.checkpoint.write import save_checkpoint
from dissect_clip.checkpoint.writer import CheckpointWriter, HostCopies

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "HostCopies",
    "Moment",
    "Plan",
    "Policy",
    "Saver",
    "find_latest",
    "find_resume",
    "load_checkpoint",
    "pack",
    "restore",
    "save_checkpoint",
]
