#!/usr/bin/env bash
''':'
# Pretrain PolyLM. This file is bash and Python at once: bash sees '' and ':' (a command that does nothing), runs these lines
# and ends at exec; Python, which torchrun starts it with, sees one string up to the closing quotes and runs what follows.
#   torchrun --nproc-per-node 8 examples/pretrain_polylm.sh [--config NAME_OR_YAML] [--flag value ..]
#   bash examples/pretrain_polylm.sh [the same flags]         one rank a GPU, or NPROC ranks
here="$(cd "$(dirname "$0")/.." && pwd)"
[ -x "$here/.venv/bin/python3" ] && PATH="$here/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
gpus="$(nvidia-smi -L 2>/dev/null | wc -l)"
exec python3 -P -m megapoly.train.launch --standalone --nproc-per-node "${NPROC:-$((gpus > 0 ? gpus : 1))}" "$0" "$@"
'''
from pathlib import Path

from megapoly.train.main import main

if __name__ == "__main__":
    main(gpu_preset="polylm-1.7b", cpu_preset="tiny", corpus=Path(__file__).parent / "data")
