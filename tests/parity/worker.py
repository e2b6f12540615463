"""One of several processes: every case in turn, compared with one rank's outcome. torchrun ... worker.py DIRECTORY"""

from __future__ import annotations

import json
import pickle
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from oreal_megatron.parallel.device import device_seam
from oreal_megatron.parallel.groups import joined_processes, split_processes
from tests.parity.oreal_step import differences, run_steps


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    cases, objective, expected = pickle.loads((directory / "cases.pickle").read_bytes())
    results = {}
    with device_seam(), joined_processes(timeout_seconds=60):
        for case in cases:
            try:
                with split_processes(case.parallel, seed=0) as groups:
                    options = {"tied": case.tied, "num_sequences": case.num_sequences}
                    mine = run_steps(groups, objective, **options)
                    one = expected[case.tied, case.num_sequences]
                    parts = groups.gather_over_world([differences(*mine, one, groups)])
            except Exception:
                # The other ranks wait for this one now: there is no going on to the next case.
                (directory / f"failed_{dist.get_rank()}.txt").write_text(f"{case.name}\n{traceback.format_exc()}")
                raise
            results[case.name] = {key: max(part[0][key] for part in parts) for key in parts[0][0]}
            if dist.get_rank() == 0:
                (directory / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
