"""A rank under torchrun: runs the plans of a file one after the other, the last one within a process group of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from pipeline_cases import run_case


def main() -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    *plans, last = json.loads(Path(sys.argv[1]).read_text())
    for plan in plans or [last]:
        run_case(plan, rank)
        assert not dist.is_initialized(), "the group that the pipeline made is still there"
    if not plans:
        return
    dist.init_process_group("gloo")
    run_case(last, rank)
    total = torch.tensor([1.0 + rank])
    dist.all_reduce(total)  # the group is as it was
    assert float(total) == sum(range(1, dist.get_world_size() + 1))
    Path(sys.argv[1]).with_suffix(f".{rank}.done").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
