"""What the first process says, in all of them: by which backend they are joined."""

import pytest
import torch
from finedeep_files import processes


@pytest.mark.parametrize(("available", "backend"), [(False, "gloo"), (True, "nccl")])
def test_the_backend_is_that_of_the_device_that_is_there(monkeypatch, available, backend):
    """A torch that is built for CUDA names it as the accelerator on machines without one too."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked, devices = [], []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    monkeypatch.setattr(torch.accelerator, "set_device_index", devices.append)
    monkeypatch.setattr(processes.distributed, "init_process_group", lambda backend, **_: asked.append(backend))
    monkeypatch.setattr(processes.distributed, "broadcast_object_list", lambda values: None)
    assert processes.share("said") == "said"
    assert asked == [backend]
    assert devices == ([0] if available else [])
