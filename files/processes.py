"""Several processes of `accelerate launch`: which one writes, and how all learn of what one has found."""

import os
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

# By which a launcher tells a process of the others.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def process_number() -> int:
    """This process among all; 0 where there is one."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def local_process_number() -> int:
    """This process among those of its machine, which is the number of its device; 0 where there is one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_process() -> bool:
    """Whether this is the process that writes and speaks."""
    return process_number() == 0


def are_several() -> bool:
    """Whether there are others."""
    return number_of_processes() > 1


def number_of_processes() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_needed() -> bool:
    """Whether this process has work to do. On CPUs the harness shares nothing out, and the first one works alone."""
    if torch.accelerator.is_available():
        return True
    needed = is_first_process()
    if needed:
        for name in LAUNCHED:
            os.environ.pop(name, None)
    return needed


def share(said: Any) -> Any:
    """What the first process says, in all of them: each calls this and waits for the others.

    The process group is made where there is none yet; accelerate, which a conversion does without, then takes this one.
    """
    if not are_several():
        return said
    if not distributed.is_initialized():
        device = "cpu"
        if torch.accelerator.is_available():  # a torch that is built for one may run where none is
            device = torch.accelerator.current_accelerator()
            torch.accelerator.set_device_index(local_process_number())
        backend = distributed.get_default_backend_for_device(device)
        # Others wait while the first one reads a text or scores; the launcher ends them where it fails.
        distributed.init_process_group(backend, timeout=timedelta(weeks=52))
    values = [said]
    distributed.broadcast_object_list(values)
    return values[0]
