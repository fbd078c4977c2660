"""What pytest-benchmark's results say of the machine, for baseline.py."""

import torch

from resnet_fused import environment


def pytest_benchmark_update_machine_info(config, machine_info):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine_info["resnet_fused"] = {
        "device_name": environment.device_name(device),
        "isa": environment.instruction_sets()[0],
        "threads": torch.get_num_threads(),
    }
