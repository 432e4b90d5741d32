"""Checks hosts before a long run: python tools/selftest.py [--folder DIR], or one rank a GPU by torchrun.

A line for each check, status 1 where one fails.
"""

import argparse
import sys
from pathlib import Path

from megapoly.arguments import ArgumentParser
from megapoly.errors import ConfigError, exit_on_error
from megapoly.parallel.mesh import check_devices, init_mesh, leave, local_rank, prepare_host
from megapoly.parallel.selftest import selftest
from megapoly.sections import Config, ParallelConfig

FAILED = 1


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description="Does this host compute, send, store and read back the same bits, and how fast?"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the run will write (default: runs)")
    parser.add_argument("--megabytes", type=int, default=256, help="size of a file and of an all-reduce (default: 256)")
    parser.add_argument("--distributed-backend", choices=("nccl", "gloo"), help="default: nccl on CUDA")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.megabytes < 1:
        raise ConfigError(f"--megabytes ({arguments.megabytes}) must be positive")
    parallel = ParallelConfig(distributed_backend=arguments.distributed_backend, distributed_timeout_minutes=2)
    prepare_host(parallel)
    check_devices(parallel)
    mesh = init_mesh(Config(parallel=parallel))
    is_good = selftest(mesh, arguments.folder, arguments.megabytes)
    leave(mesh)
    sys.exit(0 if is_good else FAILED)


if __name__ == "__main__":
    exit_on_error(main, speaks=lambda: local_rank() == 0)()
